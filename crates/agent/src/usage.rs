//! Usage samples: read from drivers, sent with the heartbeat, never kept in the store.

use std::collections::BTreeMap;
use std::sync::Mutex;

use oblak_model::wire::Usage;
use oblak_model::{InstanceId, NetworkId, Phase, PortId, Size};
use oblak_network::PortCounters;

use crate::context::{Context, lock};

/// Last sample of each guest, to make rates from.
#[derive(Default)]
pub struct Sampler {
    last: Mutex<BTreeMap<InstanceId, Usage>>,
}

impl Sampler {
    /// One sample of every running guest.
    pub async fn sample(&self, ctx: &Context) -> Vec<(InstanceId, Usage)> {
        let running: Vec<_> = {
            let world = ctx.world();
            let live = world.instances.iter().filter(|(_, i)| matches!(i.status.phase, Phase::Running | Phase::Paused));
            live.map(|(id, i)| (*id, i.status.resolved.isolation, i.status.resolved.ports.clone())).collect()
        };
        let counters = counters(ctx, &running).await;
        let mut out = Vec::new();
        for (id, isolation, ports) in running {
            let Some(driver) = ctx.drivers.compute.get(&isolation) else { continue };
            let Ok(sample) = driver.usage(id).await else { continue };
            let net = ports
                .iter()
                .filter_map(|p| counters.get(p))
                .fold((0, 0), |(rx, tx), c| (rx + c.rx_bytes, tx + c.tx_bytes));
            let usage = Usage {
                cpu_ns: sample.cpu_ns,
                cpu_milli: 0,
                memory: Size(sample.memory_bytes),
                disk_read: Size(sample.disk_read_bytes),
                disk_write: Size(sample.disk_write_bytes),
                net_rx: Size(net.0),
                net_tx: Size(net.1),
                at: ctx.clock.now(),
            };
            out.push((id, self.with_rate(id, usage)));
        }
        lock(&self.last).retain(|id, _| out.iter().any(|(o, _)| o == id));
        out
    }

    fn with_rate(&self, id: InstanceId, mut usage: Usage) -> Usage {
        let mut last = lock(&self.last);
        if let Some(before) = last.get(&id) {
            usage.cpu_milli = rate(before, &usage);
        }
        last.insert(id, usage.clone());
        usage
    }
}

/// Thousandths of a CPU between two samples; zero when the counter started over.
fn rate(before: &Usage, now: &Usage) -> u64 {
    let nanos = u64::try_from(now.at.since(before.at).as_nanos()).unwrap_or(u64::MAX);
    let used = now.cpu_ns.saturating_sub(before.cpu_ns);
    used.saturating_mul(1000).checked_div(nanos).unwrap_or(0)
}

async fn counters(
    ctx: &Context,
    running: &[(InstanceId, oblak_model::Isolation, Vec<PortId>)],
) -> BTreeMap<PortId, PortCounters> {
    let networks: std::collections::BTreeSet<NetworkId> = {
        let state = ctx.networks.borrow();
        running
            .iter()
            .flat_map(|(_, _, ports)| ports)
            .filter_map(|p| state.ports.get(p).map(|(network, ..)| *network))
            .collect()
    };
    let mut out = BTreeMap::new();
    for network in networks {
        if let Ok(counters) = ctx.drivers.network.counters(network).await {
            out.extend(counters);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::Timestamp;

    #[test]
    fn rates() {
        let at = |micros, cpu_ns| Usage { at: Timestamp::from_micros(micros), cpu_ns, ..Usage::default() };
        assert_eq!(rate(&at(0, 0), &at(1_000_000, 500_000_000)), 500);
        assert_eq!(rate(&at(0, 9), &at(1_000_000, 0)), 0);
        assert_eq!(rate(&at(5, 0), &at(5, 10)), 0);
    }
}
