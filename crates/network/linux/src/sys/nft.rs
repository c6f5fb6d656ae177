//! Whole nftables tables, replaced in one transaction and only when their content differs from what the kernel has.
//!
//! The digest of a table's text is its comment, kept by the kernel beside the table: a flushed ruleset loses it too, so the
//! next `ensure` notices.
//!
//! A transaction that replaces a table is in force at once, but a process that closes its netlink socket then waits until the kernel
//! has freed the old table (nft_rcv_nl_event in the kernel: an RCU grace period, 20 to 60 ms). Nobody has to wait for that: the
//! kernel tells listeners of a new generation, and the comments tell whether it is ours. The end of nft is collected on the side.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::SockProtocol;
use oblak_platform::process::pidfd_open;
use sha2::{Digest, Sha256};

use super::netlink::{Message, Netlink, attrs};

const TIMEOUT: Duration = Duration::from_secs(30);
const MAX_ERROR_TEXT: u64 = 4096;
/// So many nft may be on their way out unattended.
const MAX_LEAVING: usize = 16;
// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFNLGRP_NFTABLES: u32 = 7;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_USERDATA: u16 = 6;
/// Kind of a comment inside a table's user data (libnftnl, udata.h).
const UDATA_TABLE_COMMENT: u8 = 0;

/// The wanted content of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// `bridge` or `inet`.
    pub(crate) family: &'static str,
    /// Its name.
    pub(crate) name: String,
    /// What stands between the braces.
    pub(crate) body: String,
}

impl Table {
    fn digest(&self) -> String {
        Sha256::digest(self.body.as_bytes()).iter().take(16).map(|b| format!("{b:02x}")).collect()
    }

    fn family_number(&self) -> u8 {
        // NFPROTO_BRIDGE and NFPROTO_INET, linux/netfilter.h
        if self.family == "bridge" { 7 } else { 1 }
    }
}

/// Why nft did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftError {
    #[error("cannot run nft")]
    Run(#[source] io::Error),
    #[error("nft refused the rules: {0}")]
    Refused(String),
}

/// Makes the tables of the calling thread's namespace equal to `tables`, in one transaction. Returns whether anything was changed.
pub(crate) fn apply(tables: &[Table]) -> Result<bool, NftError> {
    let mut netlink = Netlink::open(SockProtocol::NetlinkNetFilter).map_err(NftError::Run)?;
    let mut wanted = Vec::new();
    let mut script = String::new();
    for table in tables {
        let digest = table.digest();
        let present = comment(&mut netlink, table.family_number(), &table.name).map_err(NftError::Run)?;
        if present.as_ref() == Some(&digest) {
            continue;
        }
        let (family, name, body) = (table.family, &table.name, &table.body);
        if present.is_some() {
            // Named once so that it exists, then deleted, then made anew: all inside the transaction.
            script += &format!("table {family} {name} {{\n}}\ndelete table {family} {name}\n");
        }
        script += &format!("table {family} {name} {{\ncomment \"{digest}\"\n{body}}}\n");
        wanted.push((table.family_number(), name.clone(), Some(digest)));
    }
    if script.is_empty() {
        return Ok(false);
    }
    run(&script, netlink, &wanted).map(|()| true)
}

/// Deletes a table of the calling thread's namespace; fine when it is not there.
pub(crate) fn delete(family: &'static str, name: &str) -> Result<(), NftError> {
    let mut netlink = Netlink::open(SockProtocol::NetlinkNetFilter).map_err(NftError::Run)?;
    let table = Table { family, name: name.to_string(), body: String::new() };
    if comment(&mut netlink, table.family_number(), name).map_err(NftError::Run)?.is_none() {
        return Ok(());
    }
    let wanted = vec![(table.family_number(), table.name, None)];
    run(&format!("table {family} {name} {{\n}}\ndelete table {family} {name}\n"), netlink, &wanted)
}

/// Whether the table exists in the calling thread's namespace.
pub(crate) fn exists(family: &'static str, name: &str) -> io::Result<bool> {
    let mut netlink = Netlink::open(SockProtocol::NetlinkNetFilter)?;
    let table = Table { family, name: name.to_string(), body: String::new() };
    Ok(comment(&mut netlink, table.family_number(), name)?.is_some())
}

/// The comment of a table, empty when it has none, `None` when there is no such table.
fn comment(netlink: &mut Netlink, family: u8, name: &str) -> io::Result<Option<String>> {
    let ask = Message::new((NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETTABLE, 0)
        .fixed(&[family, 0, 0, 0])
        .attr_str(NFTA_TABLE_NAME, name);
    let part = match netlink.get(ask) {
        Ok(part) => part.unwrap_or_default(),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    let data = attrs(part.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == NFTA_TABLE_USERDATA);
    // User data is a row of (kind: u8, length: u8, value); texts end with zero.
    let mut rest = data.map_or(&[][..], |(_, value)| value);
    while let [kind, length, tail @ ..] = rest {
        let Some(value) = tail.get(..usize::from(*length)) else { break };
        if *kind == UDATA_TABLE_COMMENT {
            return Ok(Some(super::netlink::text(value)));
        }
        rest = &tail[value.len()..];
    }
    Ok(Some(String::new()))
}

/// What shall be there afterwards: family and name of a table, and its comment, or `None` for no such table.
type Wanted = (u8, String, Option<String>);

fn holds(netlink: &mut Netlink, wanted: &[Wanted]) -> io::Result<bool> {
    for (family, name, digest) in wanted {
        if comment(netlink, *family, name)? != *digest {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets nft carry out `script`; returns as soon as the kernel has what is `wanted`.
fn run(script: &str, mut netlink: Netlink, wanted: &[Wanted]) -> Result<(), NftError> {
    let mut events = Netlink::listen(SockProtocol::NetlinkNetFilter, NFNLGRP_NFTABLES).map_err(NftError::Run)?;
    let (mut child, mut errors) = start(script).map_err(NftError::Run)?;
    let Some(status) = wait(&mut child, &mut events, || holds(&mut netlink, wanted)).map_err(NftError::Run)? else {
        leave(child, [netlink, events]);
        return Ok(());
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let _ = errors.rewind();
    let _ = errors.take(MAX_ERROR_TEXT).read_to_string(&mut text);
    tracing::debug!(script, "rules that nft refused");
    Err(NftError::Refused(text.lines().take(3).collect::<Vec<_>>().join(" ")))
}

fn start(script: &str) -> io::Result<(Child, File)> {
    let file = |name: &str| -> io::Result<File> { Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into()) };
    let (mut input, errors) = (file("nft-script")?, file("nft-errors")?);
    input.write_all(script.as_bytes())?;
    input.rewind()?;
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(input).stdout(Stdio::null()).stderr(errors.try_clone()?);
    // SAFETY: prctl is async-signal-safe. Dying with us means that no older rules can arrive after a restart.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    Ok((command.spawn()?, errors))
}

/// Waits until nft has ended, or until it is `done` after a change that the kernel told of: `None`.
fn wait(
    child: &mut Child,
    events: &mut Netlink,
    mut done: impl FnMut() -> io::Result<bool>,
) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let end = Instant::now() + TIMEOUT;
    let fd = pidfd_open(pid)?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nft did not finish"));
        }
        let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN), PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        match nix::poll::poll(&mut polled, millis) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let told = polled[1].any().unwrap_or_default();
        if told && events.drain()? && done()? {
            return Ok(None);
        }
    }
}

/// A nft that has nothing left to do but to end. Our own sockets end as slowly as its.
struct Leaving {
    child: Child,
    _sockets: [Netlink; 2],
}

/// How many there are.
static LEAVING: AtomicUsize = AtomicUsize::new(0);

impl Drop for Leaving {
    fn drop(&mut self) {
        // How it ends makes no difference any more: what it was wanted for is there.
        let _ = self.child.wait();
        LEAVING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Lets nft end on a thread of its own; where that cannot be, or there are many already, waits for it.
fn leave(child: Child, sockets: [Netlink; 2]) {
    let few = LEAVING.fetch_add(1, Ordering::Relaxed) < MAX_LEAVING;
    let leaving = Leaving { child, _sockets: sockets };
    if few {
        let _ = std::thread::Builder::new().name("nft-wait".into()).spawn(move || drop(leaving));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns::NetNs;

    fn table(body: &str) -> Table {
        Table { family: "inet", name: "test".into(), body: body.into() }
    }

    #[test]
    fn replaced_tables_are_in_force_at_once() {
        if Command::new("nft").arg("--version").output().is_err() || !nix::unistd::geteuid().is_root() {
            println!("skipped: needs nft and root");
            return;
        }
        NetNs::scratch(|| {
            let closed = table("chain input {\ntype filter hook input priority 0; policy drop;\n}\n");
            for n in 0..20 {
                let next = table(&format!("{}chain c{n} {{\n}}\n", closed.body));
                assert!(apply(std::slice::from_ref(&next)).unwrap(), "it differs from what is there");
                assert!(!apply(std::slice::from_ref(&next)).unwrap(), "it is there now");
            }
            let listed = Command::new("nft").args(["list", "table", "inet", "test"]).output()?;
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            assert!(text.contains("chain c19") && !text.contains("chain c18"), "{text}");
            let refused = apply(&[table("chain input {\nnonsense\n}\n")]);
            assert!(matches!(&refused, Err(NftError::Refused(text)) if text.contains("nonsense")), "{refused:?}");
            assert!(!exists("inet", "other")? && exists("inet", "test")?, "what was refused has changed nothing");
            delete("inet", "test").unwrap();
            delete("inet", "test").unwrap();
            assert!(!exists("inet", "test")?);
            Ok(())
        })
        .unwrap();
    }
}
