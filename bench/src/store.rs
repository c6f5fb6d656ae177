//! Durable creates of 64 clients beside raw redb writing the same keys and bytes with group commit.

use anyhow::Result;
use oblak_store::bench::{CreatesOptions, durable_creates};

use crate::Context;
use crate::report::{Goal, Row, Table};

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let measured = durable_creates(dir.path(), CreatesOptions::default())?;
    let options = measured.options;
    let what = format!("in process: creates of {} bytes, {} clients", options.value_bytes, options.clients);
    let rounds = options.rounds;
    table.row(
        Row::value(what, "creates/s", measured.store.per_second)
            .floor(measured.raw.per_second, measured.ratio)
            .samples(rounds)
            .goal(Goal::RatioAtLeast(0.8)),
    );
    table.row(
        Row::value("creates made durable by one fsync", "creates", measured.store.per_fsync)
            .floor(measured.raw.per_fsync, measured.store.per_fsync / measured.raw.per_fsync)
            .samples(rounds),
    );
    table.row(Row::value("one commit of a single client", "us", measured.single.as_secs_f64() * 1e6).samples(500));
    table.row(Row::value("one get", "us", measured.get.as_secs_f64() * 1e6).samples(2000));
    table.note("raw: one thread, one table, one fsync for whatever waits; ours also keeps revisions, history for watches and transaction ids");
    crate::creates::run(context, table)
}
