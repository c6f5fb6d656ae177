//! Sizes in bytes. On the wire an integer number of bytes goes out; strings such as `1GiB` are accepted in.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Sub};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl Size {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// `n` bytes.
    #[must_use]
    pub const fn bytes(n: u64) -> Self {
        Self(n)
    }
    /// `n` times 2^10 bytes.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    /// `n` times 2^20 bytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    /// `n` times 2^30 bytes.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    /// The number of bytes.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }
    /// Whole MiB, rounded up (what qemu wants to hear).
    #[must_use]
    pub const fn as_mib_ceil(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl Add for Size {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Size {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Sum for Size {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

const UNITS: [(&str, u64); 6] =
    [("EiB", 1 << 60), ("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Prints in the largest binary unit that gives a number of at least one, with at most one decimal: `21.4 GiB`, `1 TiB`, `512 B`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in UNITS {
            if self.0 >= factor {
                // Tenths, rounded down, in integer arithmetic so that the text never claims more than there is.
                let tenths = (u128::from(self.0) * 10) / u128::from(factor);
                let text = if tenths % 10 == 0 {
                    format!("{} {unit}", tenths / 10)
                } else {
                    format!("{}.{} {unit}", tenths / 10, tenths % 10)
                };
                return f.pad(&text);
            }
        }
        f.pad(&format!("{} B", self.0))
    }
}

/// The text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size; write a number with a unit such as 512MiB, 1GiB or 10GB, or a number of bytes")]
pub struct ParseSizeError(String);

impl FromStr for Size {
    type Err = ParseSizeError;

    /// Accepts `123`, `1GiB`, `1.5 GiB`, `10GB` (powers of 1000), `4G` (binary, as qemu-img and docker read it).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSizeError(text.chars().take(64).collect());
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "p" | "pib" => 1 << 50,
            "e" | "eib" => 1 << 60,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "pb" => 1_000_000_000_000_000,
            _ => return Err(bad()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
            return Err(bad());
        }
        let whole: u128 = whole.parse().map_err(|_| bad())?;
        let mut bytes = whole.checked_mul(u128::from(factor)).ok_or_else(bad)?;
        if !fraction.is_empty() {
            let digits: u128 = fraction.parse().map_err(|_| bad())?;
            bytes += digits * u128::from(factor) / 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        }
        Ok(Self(u64::try_from(bytes).map_err(|_| bad())?))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a size such as \"1GiB\"")
            }
            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Size, E> {
                Ok(Size(n))
            }
            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Size, E> {
                u64::try_from(n).map(Size).map_err(|_| E::custom("a size is not negative"))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "Bytes. Always an integer in answers; strings such as \"1GiB\" are accepted in requests.",
            "oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+ *[A-Za-z]*$"}]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_units() {
        assert_eq!("1GiB".parse::<Size>().unwrap(), Size::gib(1));
        assert_eq!("1.5 GiB".parse::<Size>().unwrap(), Size::mib(1536));
        assert_eq!("10GB".parse::<Size>().unwrap(), Size(10_000_000_000));
        assert_eq!("4g".parse::<Size>().unwrap(), Size::gib(4));
        assert_eq!("77".parse::<Size>().unwrap(), Size(77));
        for bad in ["", "GiB", "1.", "-1", "1 XB", "99999999999999999999", "20000PiB", "1e3"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prints_short() {
        assert_eq!(Size(0).to_string(), "0 B");
        assert_eq!(Size::gib(1).to_string(), "1 GiB");
        assert_eq!(Size::mib(1536).to_string(), "1.5 GiB");
        assert_eq!((Size::gib(1024)).to_string(), "1 TiB");
    }

    #[test]
    fn json_takes_both_forms() {
        assert_eq!(serde_json::from_str::<Size>("\"2MiB\"").unwrap(), Size::mib(2));
        assert_eq!(serde_json::from_str::<Size>("7").unwrap(), Size(7));
        assert_eq!(serde_json::to_string(&Size::kib(1)).unwrap(), "1024");
        assert!(serde_json::from_str::<Size>("-7").is_err());
    }

    proptest! {
        #[test]
        fn whole_bytes_round_trip(n in any::<u64>()) {
            prop_assert_eq!(n.to_string().parse::<Size>().unwrap(), Size(n));
        }
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = text.parse::<Size>();
        }
        #[test]
        fn the_text_never_claims_more(n in any::<u64>()) {
            let printed = Size(n).to_string().parse::<Size>().unwrap();
            prop_assert!(printed.0 <= n);
        }
    }
}
