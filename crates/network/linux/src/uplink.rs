//! Addresses of uplinks. Every network has a pair of its own, so that the host never sees addresses of tenants.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use oblak_model::NetworkId;
use oblak_platform::driver::{DriverError, DriverResult};
use sha2::{Digest, Sha256};

/// Shared address space (RFC 6598): 2^21 pairs.
const POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
/// A unique local prefix (RFC 4193) for the same pairs in IPv6.
const POOL6: [u16; 3] = [0xfd6f, 0x626c, 0x616b];
const PAIRS: u32 = 1 << 21;
/// Prefix length of a pair (RFC 3021).
pub(crate) const PREFIX: u8 = 31;
/// Prefix length of a pair in IPv6 (RFC 6164).
pub(crate) const PREFIX6: u8 = 127;
const MAX_ATTEMPTS: u32 = 1000;

/// All uplink addresses, as nft writes a prefix.
pub(crate) fn pool() -> String {
    POOL.to_string()
}

/// The host's address of a pair.
pub(crate) fn host4(pair: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(POOL.network()) + pair * 2)
}

/// The network's address of a pair.
pub(crate) fn network4(pair: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(POOL.network()) + pair * 2 + 1)
}

/// The host's IPv6 address of a pair.
pub(crate) fn host6(pair: u32) -> Ipv6Addr {
    address6(pair, 2)
}

/// The network's IPv6 address of a pair.
pub(crate) fn network6(pair: u32) -> Ipv6Addr {
    address6(pair, 3)
}

fn address6(pair: u32, last: u16) -> Ipv6Addr {
    let (high, low) = ((pair >> 16) as u16, (pair & 0xffff) as u16);
    Ipv6Addr::new(POOL6[0], POOL6[1], POOL6[2], high, low, 0, 0, last)
}

/// Picks a pair that nobody uses: neither other networks (`taken`), nor the host (`busy`, prefixes it has addresses or routes
/// for), nor the network's own subnets. The same inputs give the same pair.
pub(crate) fn choose(tag: &str, id: NetworkId, taken: &[u32], busy: &[IpNet], subnets: &[IpNet]) -> DriverResult<u32> {
    (0..MAX_ATTEMPTS)
        .map(|attempt| {
            let digest = Sha256::digest(format!("{tag} {id} {attempt}"));
            u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) % PAIRS
        })
        .find(|pair| !taken.contains(pair) && !overlaps(*pair, busy) && !overlaps(*pair, subnets))
        .ok_or_else(|| {
            let detail =
                format!("network {id}: no free pair of uplink addresses in {POOL}; the host or the subnets use them");
            DriverError::permanent("uplink_exhausted", detail)
        })
}

/// Whether the pair lies in one of the prefixes, or one of them in the pair.
pub(crate) fn overlaps(pair: u32, prefixes: &[IpNet]) -> bool {
    let v4 = Ipv4Net::new_assert(host4(pair), PREFIX);
    prefixes.iter().any(|p| match p {
        IpNet::V4(p) => p.contains(&v4) || v4.contains(p),
        IpNet::V6(p) => p.contains(&host6(pair)),
    })
}

/// What the host already uses, from its addresses and routes. Prefixes as wide as the pool are left out: a pair is more
/// specific and wins.
pub(crate) fn busy(addresses: impl Iterator<Item = (IpAddr, u8)>) -> Vec<IpNet> {
    addresses
        .filter_map(|(ip, prefix)| IpNet::new(ip, prefix).ok())
        .map(|net| net.trunc())
        .filter(|net| match net {
            IpNet::V4(net) => POOL.contains(net) && net.prefix_len() > POOL.prefix_len(),
            IpNet::V6(net) => net.network().segments()[..3] == POOL6,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> NetworkId {
        uuid::Uuid::from_u128(7).into()
    }

    #[test]
    fn pairs_are_distinct_and_stay_in_the_pool() {
        assert_eq!(host4(0), Ipv4Addr::new(100, 64, 0, 0));
        assert_eq!(network4(PAIRS - 1), Ipv4Addr::new(100, 127, 255, 255));
        assert_ne!(host6(1), host6(1 << 16));
    }

    #[test]
    fn avoids_what_is_used() {
        let first = choose("t", id(), &[], &[], &[]).unwrap();
        assert_eq!(choose("t", id(), &[], &[], &[]).unwrap(), first);
        let busy = busy([(IpAddr::V4(host4(first)), 16)].into_iter());
        let second = choose("t", id(), &[], &busy, &[]).unwrap();
        assert_ne!(host4(first).octets()[1..2], host4(second).octets()[1..2]);
        assert_ne!(choose("t", id(), &[first], &[], &[]).unwrap(), first);
        let all: IpNet = "100.64.0.0/10".parse().unwrap();
        assert_eq!(choose("t", id(), &[], &[], &[all]).unwrap_err().code, "uplink_exhausted");
    }
}
