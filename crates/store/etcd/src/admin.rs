//! Looking after etcd itself: members, leader, size, alarms, defragmentation, snapshots.
//!
//! With authentication enabled etcd asks for the role `root` for most of this.

use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, MemberAddOptions, UserAddOptions};
use oblak_store::{Result, StoreError};
use sha2::{Digest, Sha256};
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;

use crate::EtcdOptions;
use crate::cluster::{ATTEMPT, Cluster};
use crate::failure::{Failure, Kind};

/// A server does nothing else while it is defragmented, some seconds for each gigabyte.
const DEFRAGMENT: Duration = Duration::from_secs(120);
/// Longest wait for the next piece of a snapshot.
const PIECE: Duration = Duration::from_secs(20);
/// etcd appends a SHA-256 of what it sent.
const DIGEST_BYTES: usize = 32;

/// A member of the cluster as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name in etcd's own words, a number.
    pub id: u64,
    /// Name that a person gave it; empty until it has started once.
    pub name: String,
    /// Where members reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// Whether it copies the log without a vote.
    pub learner: bool,
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Which member it is.
    pub member: u64,
    /// Member that leads, in its opinion; 0 when it knows of none.
    pub leader: u64,
    /// Version of etcd.
    pub version: String,
    /// Size of its file in bytes.
    pub bytes: u64,
    /// Bytes of it in use; defragmentation gives the rest back. 0 where etcd does not say.
    pub bytes_in_use: u64,
    /// Raft's term: grows with each election.
    pub term: u64,
    /// What it complains about.
    pub errors: Vec<String>,
}

/// What is wrong with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlarmKind {
    /// Its quota is exceeded; the cluster takes no writes until the alarm is cleared.
    NoSpace,
    /// Its data differ from those of the others.
    Corrupt,
}

/// An alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm {
    /// Which member raised it.
    pub member: u64,
    /// Why.
    pub kind: AlarmKind,
}

/// A snapshot that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The file, for `etcdctl snapshot restore`.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// Connections for looking after etcd.
pub struct Admin {
    cluster: Cluster,
}

impl Admin {
    /// Connects when it is used.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the options contradict each other.
    pub fn new(options: &EtcdOptions) -> Result<Self> {
        Ok(Self { cluster: Cluster::new(options)? })
    }

    /// All members of the cluster.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or [`StoreError::Refused`], as for all functions here.
    pub async fn members(&self) -> Result<Vec<Member>> {
        let answer = self.cluster.call(|mut client| async move { client.member_list().await }).await;
        let answer = answer.map_err(Failure::into_store_error)?;
        let member = |member: &etcd_client::Member| Member {
            id: member.id(),
            name: member.name().to_owned(),
            peer_urls: member.peer_urls().to_vec(),
            client_urls: member.client_urls().to_vec(),
            learner: member.is_learner(),
        };
        Ok(answer.members().iter().map(member).collect())
    }

    /// Adds a member that copies the log and has no vote. etcd 3.4 takes one such at a time.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn add_learner(&self, peer_url: &str) -> Result<()> {
        // Not repeated by itself: the second time it would be there already, which is found out by looking.
        let added = self.cluster.attempt(|mut client| async move {
            client.member_add([peer_url], Some(MemberAddOptions::new().with_is_learner())).await
        });
        added.await.map(drop).map_err(Failure::into_store_error)
    }

    /// Gives a learner a vote. etcd refuses as long as it has not caught up.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn promote(&self, member: u64) -> Result<()> {
        let promoted = self.cluster.attempt(|mut client| async move { client.member_promote(member).await });
        promoted.await.map(drop).map_err(Failure::into_store_error)
    }

    /// Removes a member. etcd refuses when too few of the others are there.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn remove_member(&self, member: u64) -> Result<()> {
        let removed = self.cluster.attempt(|mut client| async move { client.member_remove(member).await });
        removed.await.map(drop).map_err(Failure::into_store_error)
    }

    /// Lets in only who shows a certificate with the name `root`, from now on. Doing it again changes nothing.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn require_root(&self) -> Result<()> {
        const ROOT: &str = "root";
        self.idempotent(|mut client| async move {
            client.user_add(ROOT, "", Some(UserAddOptions::new().with_no_pwd())).await.map(drop)
        })
        .await?;
        self.idempotent(|mut client| async move { client.role_add(ROOT).await.map(drop) }).await?;
        self.idempotent(|mut client| async move { client.user_grant_role(ROOT, ROOT).await.map(drop) }).await?;
        self.idempotent(|mut client| async move { client.auth_enable().await.map(drop) }).await
    }

    /// A call whose effect may be there already.
    async fn idempotent<F>(&self, work: impl Fn(etcd_client::Client) -> F) -> Result<()>
    where
        F: Future<Output = std::result::Result<(), etcd_client::Error>>,
    {
        match self.cluster.call(work).await {
            Err(failure) if failure.detail.contains("already exists") => Ok(()),
            other => other.map_err(Failure::into_store_error),
        }
    }

    /// What each server that was given says of itself, or why it says nothing, with its URL.
    pub async fn statuses(&self) -> Vec<(String, Result<Status>)> {
        let urls = self.cluster.urls();
        let statuses = (0..urls.len()).map(|index| self.status(index));
        urls.iter().cloned().zip(futures_util::future::join_all(statuses).await).collect()
    }

    async fn status(&self, index: usize) -> Result<Status> {
        let mut chosen = self.cluster.client_of(index).await.map_err(Failure::into_store_error)?;
        let answer = match tokio::time::timeout(ATTEMPT, chosen.client.status()).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(Failure::from_client(&chosen.url, &error).into_store_error()),
            Err(_) => return Err(Failure::timeout(&chosen.url, ATTEMPT).into_store_error()),
        };
        let bytes = |size: i64| u64::try_from(size).unwrap_or(0);
        Ok(Status {
            member: answer.header().map_or(0, etcd_client::ResponseHeader::member_id),
            leader: answer.leader(),
            version: answer.version().to_owned(),
            bytes: bytes(answer.db_size()),
            bytes_in_use: bytes(answer.raft_used_db_size()),
            term: answer.raft_term(),
            errors: answer.errors().to_vec(),
        })
    }

    /// Alarms that are raised.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn alarms(&self) -> Result<Vec<Alarm>> {
        let asked =
            self.cluster.call(|mut client| async move { client.alarm(AlarmAction::Get, AlarmType::None, None).await });
        let kind = |alarm| match alarm {
            AlarmType::Nospace => Some(AlarmKind::NoSpace),
            AlarmType::Corrupt => Some(AlarmKind::Corrupt),
            AlarmType::None => None,
        };
        let answer = asked.await.map_err(Failure::into_store_error)?;
        let alarms = answer.alarms().iter();
        Ok(alarms.filter_map(|a| Some(Alarm { member: a.member_id(), kind: kind(a.alarm())? })).collect())
    }

    /// Clears an alarm. For [`AlarmKind::NoSpace`] after room was made, or it comes back.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn clear(&self, alarm: Alarm) -> Result<()> {
        let kind = match alarm.kind {
            AlarmKind::NoSpace => AlarmType::Nospace,
            AlarmKind::Corrupt => AlarmType::Corrupt,
        };
        let cleared = self.cluster.call(|mut client| async move {
            let mut options = AlarmOptions::new();
            options.with_member(alarm.member);
            client.alarm(AlarmAction::Deactivate, kind, Some(options)).await
        });
        cleared.await.map(drop).map_err(Failure::into_store_error)
    }

    /// Gives the space of what was compacted back to the file system, one server after the other: each answers nothing meanwhile. Call it
    /// with the leader last in the list of endpoints to spare an election.
    ///
    /// # Errors
    /// As for [`Admin::members`], at the first server that fails; the later ones are left as they are.
    pub async fn defragment(&self) -> Result<()> {
        for index in 0..self.cluster.urls().len() {
            self.defragment_one(index).await?;
        }
        Ok(())
    }

    /// As [`Admin::defragment`], of one of the servers that were given.
    ///
    /// # Errors
    /// As for [`Admin::members`].
    pub async fn defragment_one(&self, index: usize) -> Result<()> {
        let mut chosen = self.cluster.client_of(index).await.map_err(Failure::into_store_error)?;
        match tokio::time::timeout(DEFRAGMENT, chosen.client.defragment()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Failure::from_client(&chosen.url, &error).into_store_error()),
            Err(_) => Err(Failure::timeout(&chosen.url, DEFRAGMENT).into_store_error()),
        }
    }

    /// Saves all of etcd, every cloud in it, to a new file that only its owner can read. It appears under its name when it is whole.
    ///
    /// # Errors
    /// As for [`Admin::members`]; [`StoreError::Io`] when the file exists or cannot be written; [`StoreError::Corrupt`] when what came does
    /// not match its checksum.
    pub async fn snapshot(&self, path: &Path) -> Result<Snapshot> {
        let io = |source| StoreError::Io { action: "save a snapshot of", path: path.to_path_buf(), source };
        if tokio::fs::try_exists(path).await.map_err(io)? {
            return Err(io(std::io::Error::new(
                std::io::ErrorKind::AlreadyExists,
                "the file exists; choose another name",
            )));
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".partial");
        let partial = PathBuf::from(name);
        let written = self.write_snapshot(path, &partial).await;
        if written.is_err() {
            // A partial file is of no use; it is overwritten next time when it cannot be removed now.
            let _ = tokio::fs::remove_file(&partial).await;
        }
        let bytes = written?;
        tokio::fs::rename(&partial, path).await.map_err(io)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).await.map_err(io)?.sync_all().await.map_err(io)?;
        Ok(Snapshot { path: path.to_path_buf(), bytes })
    }

    async fn write_snapshot(&self, path: &Path, partial: &Path) -> Result<u64> {
        let io = |source| StoreError::Io { action: "save a snapshot of", path: path.to_path_buf(), source };
        let mut options = OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(partial).await.map_err(io)?;
        let asked = self.cluster.call(|mut client| async move { client.snapshot().await }).await;
        let mut stream = asked.map_err(Failure::into_store_error)?;
        let (mut digest, mut bytes) = (Sha256::new(), 0);
        // The last bytes are the digest of all before them, and pieces end anywhere.
        let mut tail: Vec<u8> = Vec::new();
        loop {
            let failure = match tokio::time::timeout(PIECE, stream.message()).await {
                Ok(Ok(Some(piece))) => {
                    file.write_all(piece.blob()).await.map_err(io)?;
                    bytes += piece.blob().len() as u64;
                    tail.extend_from_slice(piece.blob());
                    let sure = tail.len().saturating_sub(DIGEST_BYTES);
                    digest.update(&tail[..sure]);
                    tail.drain(..sure);
                    continue;
                }
                Ok(Ok(None)) => break,
                Ok(Err(error)) => Failure::from_client("etcd", &error),
                Err(_) => Failure::new(Kind::Lost, format!("no data for {} s", PIECE.as_secs())),
            };
            return Err(failure.into_store_error());
        }
        if digest.finalize().as_slice() != tail {
            let detail = "the snapshot does not match its checksum; take another".into();
            return Err(StoreError::Corrupt { path: path.to_path_buf(), detail });
        }
        file.sync_all().await.map_err(io)?;
        Ok(bytes)
    }
}
