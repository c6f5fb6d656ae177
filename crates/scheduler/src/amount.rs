//! Quantities: what an instance asks for, what a node can give, and how both are printed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One million: shares and scores are integers in millionths.
pub const PPM: u32 = 1_000_000;

/// A resource that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Virtual CPUs, in thousandths.
    Cpu,
    /// Memory, in bytes.
    Memory,
    /// Local disk, in bytes.
    Disk,
}

impl Resource {
    /// All of them, in the order of the internal arrays.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Disk];

    /// `cpu`, `memory` or `disk`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Indexed by `Resource as usize`.
pub(crate) type Amounts = [u64; 3];

/// An amount of every resource.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a virtual CPU.
    pub cpu_milli: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
}

impl Resources {
    /// A compact constructor: thousandths of a vCPU, bytes, bytes.
    #[must_use]
    pub const fn new(cpu_milli: u32, memory: u64, disk: u64) -> Self {
        Self { cpu_milli, memory, disk }
    }

    pub(crate) fn amounts(self) -> Amounts {
        [u64::from(self.cpu_milli), self.memory, self.disk]
    }
}

/// How much of a node's allocatable resources may be promised, in thousandths: 1000 promises what is there, 4000 four
/// times as much, 900 keeps a tenth back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overcommit {
    /// Thousandths.
    pub cpu: u32,
    /// Thousandths.
    pub memory: u32,
    /// Thousandths.
    pub disk: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu: 1000, memory: 1000, disk: 1000 }
    }
}

impl Overcommit {
    /// The most that may be promised of `allocatable`; rounds down, saturates at `u64::MAX`.
    pub(crate) fn limits(self, allocatable: Resources) -> Amounts {
        let ratios = [self.cpu, self.memory, self.disk];
        let mut limits = allocatable.amounts();
        for (limit, ratio) in limits.iter_mut().zip(ratios) {
            let promised = u128::from(*limit) * u128::from(ratio) / 1000;
            *limit = u64::try_from(promised).unwrap_or(u64::MAX);
        }
        limits
    }
}

/// `part / whole` in millionths, rounded down, at most [`PPM`]. A whole of nothing has no share.
pub(crate) fn share(part: u64, whole: u64) -> Option<u32> {
    if whole == 0 {
        return None;
    }
    if part >= whole {
        return Some(PPM);
    }
    let ppm = match part.checked_mul(u64::from(PPM)) {
        Some(scaled) => scaled / whole,
        None => (u128::from(part) * u128::from(PPM) / u128::from(whole)) as u64,
    };
    Some(ppm as u32)
}

/// The share that is left of the scarcest resource, and which one that is. A node that has nothing at all is full.
/// Resources that a node does not have (a limit of zero) do not count.
pub(crate) fn tightness(free: &Amounts, limit: &Amounts) -> (u32, Resource) {
    let mut tightest = None;
    for (resource, (free, limit)) in Resource::ALL.into_iter().zip(free.iter().zip(limit)) {
        if let Some(left) = share(*free, *limit)
            && tightest.is_none_or(|(least, _)| left < least)
        {
            tightest = Some((left, resource));
        }
    }
    tightest.unwrap_or((0, Resource::Cpu))
}

/// Which way a printed number is rounded: what is asked up, what is free down, so that a refusal never reads as
/// "21.4 GiB asked, 21.4 GiB free".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// Towards the larger number.
    Up,
    /// Towards the smaller number.
    Down,
}

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Bytes in binary units with at most one decimal: `512 MiB`, `21.4 GiB`, `1 TiB`.
#[must_use]
pub fn format_bytes(bytes: u64, round: Round) -> String {
    let mut unit = 0;
    while unit + 1 < UNITS.len() && tenths(bytes, unit, round) >= 10_240 {
        unit += 1;
    }
    let tenths = tenths(bytes, unit, round);
    let (whole, rest) = (tenths / 10, tenths % 10);
    if rest == 0 { format!("{whole} {}", UNITS[unit]) } else { format!("{whole}.{rest} {}", UNITS[unit]) }
}

fn tenths(bytes: u64, unit: usize, round: Round) -> u128 {
    let scaled = u128::from(bytes) * 10;
    let size = 1u128 << (10 * unit);
    match round {
        Round::Up => scaled.div_ceil(size),
        Round::Down => scaled / size,
    }
}

/// Thousandths of a vCPU as `2 vCPU`, `12.5 vCPU`; exact.
#[must_use]
pub fn format_cpu(milli: u64) -> String {
    let (whole, rest) = (milli / 1000, milli % 1000);
    if rest == 0 {
        return format!("{whole} vCPU");
    }
    let decimals = format!("{rest:03}");
    format!("{whole}.{} vCPU", decimals.trim_end_matches('0'))
}

pub(crate) fn format_amount(resource: Resource, amount: u64, round: Round) -> String {
    match resource {
        Resource::Cpu => format_cpu(amount),
        Resource::Memory | Resource::Disk => format_bytes(amount, round),
    }
}

/// Millionths as a percentage with at most one decimal: `3.2 %`.
pub(crate) fn format_ppm(ppm: i64) -> String {
    let tenths = ppm.unsigned_abs() / 1000;
    let sign = if ppm < 0 { "-" } else { "" };
    let (whole, rest) = (tenths / 10, tenths % 10);
    if rest == 0 { format!("{sign}{whole} %") } else { format!("{sign}{whole}.{rest} %") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_printed_in_binary_units_with_one_trimmed_decimal() {
        let gib = 1u64 << 30;
        for (bytes, round, text) in [
            (0, Round::Down, "0 B"),
            (1023, Round::Down, "1023 B"),
            (1024, Round::Down, "1 KiB"),
            (1536, Round::Down, "1.5 KiB"),
            (512 << 20, Round::Up, "512 MiB"),
            (22_978_075_034, Round::Down, "21.4 GiB"),
            (22_978_075_034, Round::Up, "21.5 GiB"),
            (1024 * gib, Round::Up, "1 TiB"),
            (1024 * gib - 1, Round::Up, "1 TiB"),
            (1024 * gib - 1, Round::Down, "1023.9 GiB"),
            (u64::MAX, Round::Up, "16 EiB"),
        ] {
            assert_eq!(format_bytes(bytes, round), text, "{bytes} {round:?}");
        }
    }

    #[test]
    fn cpus_are_printed_exactly() {
        for (milli, text) in
            [(0, "0 vCPU"), (2000, "2 vCPU"), (12_500, "12.5 vCPU"), (1, "0.001 vCPU"), (250, "0.25 vCPU")]
        {
            assert_eq!(format_cpu(milli), text);
        }
    }

    #[test]
    fn limits_round_down_and_saturate() {
        let over = Overcommit { cpu: 4000, memory: 1500, disk: 2000 };
        assert_eq!(over.limits(Resources::new(3, 3, u64::MAX)), [12, 4, u64::MAX]);
    }

    #[test]
    fn shares_never_overflow_and_ignore_missing_resources() {
        assert_eq!(share(u64::MAX - 1, u64::MAX), Some(999_999));
        assert_eq!(share(1, 0), None);
        assert_eq!(tightness(&[50, 10, 0], &[100, 100, 0]), (100_000, Resource::Memory));
        assert_eq!(tightness(&[0, 0, 0], &[0, 0, 0]), (0, Resource::Cpu));
    }
}
