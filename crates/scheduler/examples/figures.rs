//! Prints the scheduler's figures: `cargo run --release -p oblak-scheduler --example figures [nodes instances decisions]`.

use std::time::Instant;

use oblak_scheduler::bench::{Size, packing, throughput};

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|number| number.parse().ok());
    let mut size = Size::default();
    size.nodes = numbers.next().unwrap_or(size.nodes);
    size.instances = numbers.next().unwrap_or(size.instances);
    size.decisions = numbers.next().unwrap_or(size.decisions);
    let start = Instant::now();
    println!("{}", throughput(size, || start.elapsed()));
    println!("{}", packing(20, 100, 1));
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
    }
}
