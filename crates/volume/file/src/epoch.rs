//! Who may write to a volume of a pool that several nodes have: the one that comes with the largest epoch.
//!
//! ```text
//! <pool>/<id>/epoch-<20 digits>     one file for each epoch that was claimed; the largest counts, smaller ones are removed
//! ```
//! A claim makes its file by link(2) from a complete one, which is atomic on local file systems and over NFS alike, and looks again afterwards:
//! of two claims at the same time at most the larger one goes through. Whoever was overtaken must not write any more; that it does not is what
//! the lease of its node is for. A claim with an outdated epoch is refused, however late it comes.

use std::io::{self, Write};
use std::path::Path;

use oblak_model::VolumeId;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_volume::Claim;

const PREFIX: &str = "epoch-";

fn name(epoch: u64) -> String {
    format!("{PREFIX}{epoch:020}")
}

/// The largest epoch that was claimed.
fn newest(home: &Path) -> io::Result<Option<u64>> {
    let mut newest = None;
    for entry in std::fs::read_dir(home)? {
        let name = entry?.file_name();
        let epoch = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse().ok());
        newest = newest.max(epoch);
    }
    Ok(newest)
}

/// Claims the volume, or refuses.
pub fn claim(home: &Path, id: VolumeId, claim: &Claim) -> DriverResult<()> {
    let failed = |e: io::Error| DriverError::io(&format!("volume {id}: claiming it"), &e);
    match newest(home).map_err(failed)? {
        Some(other) if other > claim.epoch => return Err(stale(home, id, claim, other)),
        Some(same) if same == claim.epoch => {}
        _ => make(home, claim).map_err(failed)?,
    }
    // Somebody may have made the same file, or a larger one, since we looked.
    let newest = newest(home).map_err(failed)?.unwrap_or_default();
    let holder: Option<Claim> = fsx::read_json(&home.join(name(claim.epoch))).map_err(failed)?;
    // The instance is only for people: a node gives a volume back and takes it again under one epoch.
    if newest > claim.epoch || holder.is_none_or(|holder| holder.node != claim.node) {
        return Err(stale(home, id, claim, newest));
    }
    forget_older(home, claim.epoch).map_err(failed)
}

fn make(home: &Path, claim: &Claim) -> io::Result<()> {
    let temp = home.join(format!(".claim-{}-{}", claim.node, claim.epoch));
    fsx::remove_file_if_exists(&temp)?;
    let mut file = std::fs::File::create_new(&temp)?;
    file.write_all(&serde_json::to_vec(claim)?)?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&temp, home.join(name(claim.epoch)));
    fsx::remove_file_if_exists(&temp)?;
    match linked {
        // Who made it is looked at afterwards.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked.and_then(|()| fsx::sync_dir(home)),
    }
}

fn forget_older(home: &Path, epoch: u64) -> io::Result<()> {
    for entry in std::fs::read_dir(home)? {
        let entry = entry?;
        let found = entry.file_name().to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse::<u64>().ok());
        if found.is_some_and(|found| found < epoch) {
            fsx::remove_file_if_exists(&entry.path())?;
        }
    }
    Ok(())
}

fn stale(home: &Path, id: VolumeId, claim: &Claim, newest: u64) -> DriverError {
    let holder: Option<Claim> = fsx::read_json(&home.join(name(newest))).ok().flatten();
    let holder =
        holder.map_or_else(|| "another node".into(), |h| format!("node {} for instance {}", h.node, h.instance));
    DriverError::permanent(
        "stale_epoch",
        format!("volume {id}: {holder} has it with epoch {newest}; epoch {} came too late", claim.epoch),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(node: &str, epoch: u64) -> Claim {
        Claim { instance: "db".into(), node: node.into(), epoch }
    }

    #[test]
    fn a_stale_epoch_is_refused_however_late_it_comes() {
        let home = tempfile::tempdir().unwrap();
        let id = VolumeId::default();
        let try_claim = |node: &str, epoch| claim(home.path(), id, &of(node, epoch)).map_err(|e| e.code);
        assert_eq!(try_claim("n1", 3), Ok(()));
        assert_eq!(try_claim("n1", 3), Ok(()), "the same again");
        assert_eq!(try_claim("n2", 3), Err("stale_epoch".into()), "an epoch belongs to one node");
        assert_eq!(try_claim("n2", 4), Ok(()));
        assert_eq!(try_claim("n1", 3), Err("stale_epoch".into()));
        assert_eq!(try_claim("n1", 5), Ok(()));
        let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [name(5).as_str()], "nothing is left of older claims");
    }

    #[test]
    fn of_claims_at_the_same_time_the_largest_ends_up_with_it() {
        let home = tempfile::tempdir().unwrap();
        let won: Vec<u64> = std::thread::scope(|scope| {
            let tries: Vec<_> = (1..=16u64)
                .map(|epoch| {
                    let home = home.path();
                    scope.spawn(move || {
                        claim(home, VolumeId::default(), &of(&format!("n{epoch}"), epoch)).is_ok().then_some(epoch)
                    })
                })
                .collect();
            tries.into_iter().filter_map(|t| t.join().unwrap()).collect()
        });
        assert!(won.contains(&16), "the largest is never refused: {won:?}");
        assert_eq!(newest(home.path()).unwrap(), Some(16));
        assert!(claim(home.path(), VolumeId::default(), &of("n3", 3)).is_err());
    }
}
