//! Decisions per second in a large world, and packing beside exhaustive best fits. One thread.

use std::time::Instant;

use anyhow::Result;
use oblak_scheduler::bench::{MIX, Size, packing, throughput};

use crate::Context;
use crate::report::{Goal, Row, Table};

/// Sampled worlds for packing, nodes in each, and the seed.
const WORLDS: (u32, u32, u64) = (40, 60, 11);

/// Runs the measurement.
pub fn run(_: &Context, table: &mut Table) -> Result<()> {
    let began = Instant::now();
    let figures = throughput(Size::default(), || began.elapsed());
    let size = figures.size;
    let decisions = size.decisions as usize;
    let what = format!("decisions, {} nodes, {} instances placed", size.nodes, figures.placed);
    table.row(
        Row::value(what, "decisions/s", figures.decisions_per_second).samples(decisions).goal(Goal::AtLeast(50_000.0)),
    );
    table.row(
        Row::value("decisions with 3 runners-up", "decisions/s", figures.with_alternatives_per_second)
            .samples(decisions),
    );
    table
        .row(Row::value("decide, place, remove an older one", "rounds/s", figures.churn_per_second).samples(decisions));
    table.row(
        Row::value("decide and place, from empty", "placements/s", figures.fill_per_second)
            .samples(figures.placed as usize),
    );
    table.row(Row::value("one decision, median", "us", figures.median.as_secs_f64() * 1e6).samples(decisions));
    table.row(Row::value("one decision, 99 of 100 within", "us", figures.p99.as_secs_f64() * 1e6).samples(decisions));
    let (worlds, nodes, seed) = WORLDS;
    let packed = packing(worlds, nodes, seed);
    table.row(
        Row::value(format!("packing, {worlds} worlds of {nodes} nodes"), "% filled", packed.filled * 100.0)
            .floor(packed.filled * 100.0 / packed.mean_ratio, packed.mean_ratio)
            .samples(worlds as usize)
            .goal(Goal::RatioAtLeast(0.98)),
    );
    table.row(Row::value("packing, the worst of the worlds", "x", packed.worst_ratio).samples(worlds as usize));
    table.note(format!("mix: {MIX}"));
    table.note(format!("of 1000 decisions {} were refusals with an explanation", figures.refused_per_mille));
    table.note("packing: the floor is, in each world, the best of three exhaustive best fits (least left of the scarcest, of the most plentiful, of cpu and memory together)");
    Ok(())
}
