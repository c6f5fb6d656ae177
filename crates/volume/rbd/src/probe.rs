//! What can be used here: the programs, the cluster, the pool and its space.

use oblak_model::Size;
use oblak_platform::driver::{Availability, DriverResult};
use oblak_volume::Capabilities;
use serde::Deserialize;

use crate::command::{Ceph, QUICK, parse};

#[derive(Deserialize)]
struct Df {
    pools: Vec<PoolDf>,
}
#[derive(Deserialize)]
struct PoolDf {
    name: String,
    stats: PoolStats,
}
/// `bytes_used` counts every replica, `max_avail` and `stored` do not.
#[derive(Deserialize)]
struct PoolStats {
    stored: u64,
    max_avail: u64,
}

/// Looks at the cluster; every reason why it cannot be used is said.
pub async fn probe(ceph: &Ceph) -> Capabilities {
    let mut found = Capabilities::default();
    match space(ceph).await {
        Ok(Some(stats)) => {
            found.available = true;
            found.capacity = Size(stats.stored.saturating_add(stats.max_avail));
            found.free = Size(stats.max_avail);
            found.probed.push(Availability::yes("rbd", format!("pool {}", ceph.config.pool)));
        }
        Ok(None) => {
            let reason =
                format!("Ceph has no pool {0}; ceph osd pool create {0} && rbd pool init {0}", ceph.config.pool);
            found.probed.push(Availability::no("rbd", reason));
        }
        Err(error) => found.probed.push(Availability::no("rbd", error.to_string())),
    }
    found
}

async fn space(ceph: &Ceph) -> DriverResult<Option<PoolStats>> {
    let text = ceph.run("ceph", &["df", "--format", "json"], QUICK).await?;
    let text = text.map_err(|f| f.into_error("ceph df"))?;
    let df: Df = parse("ceph df", &text)?;
    Ok(df.pools.into_iter().find(|p| p.name == ceph.config.pool).map(|p| p.stats))
}
