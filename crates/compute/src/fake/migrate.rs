//! Fake guests move by a word over the stream of their memory, which takes a scripted time.

use std::time::Duration;

use async_trait::async_trait;
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::{FakeDriver, Guest};
use crate::migrate::{Lane, Limits, Migrate, Offer, Sending, Stage};
use crate::{ComputeDriver, GuestSpec, Observation};

/// What stands for the whole memory of a guest.
const MEMORY: &[u8; 6] = b"memory";
/// How long it takes while the guest runs.
const COPY: Duration = Duration::from_millis(50);
/// How long it is looked for what has arrived.
const LOOK: Duration = Duration::from_millis(1);

/// A guest that is sent.
pub(super) struct Outgoing {
    begun: Instant,
    /// Taken by whoever writes the last of it.
    stream: Option<BoxDuplex>,
    stage: Option<Stage>,
}

/// A guest that waits.
#[derive(Default)]
pub(super) struct Incoming {
    stream: Option<BoxDuplex>,
    whole: bool,
}

impl Outgoing {
    pub(super) fn stage(&self, now: Instant) -> Stage {
        self.stage.unwrap_or(if now < self.begun + COPY { Stage::Memory } else { Stage::Paused })
    }
    /// Whether the guest stands still for it.
    pub(super) fn is_still(&self, now: Instant) -> bool {
        matches!(self.stage(now), Stage::Paused | Stage::Sent)
    }
}

fn absent(id: InstanceId) -> DriverError {
    DriverError::gone(format!("instance {id} is not here"))
}

impl FakeDriver {
    fn with_guest<T>(&self, id: InstanceId, f: impl FnOnce(&mut Guest, Instant) -> T) -> DriverResult<T> {
        let mut state = self.world().lock();
        let result = state.guests.get_mut(&id).map(|g| f(g, Instant::now())).ok_or_else(|| absent(id));
        drop(state);
        self.world().changed.notify_waiters();
        result
    }
}

#[async_trait]
impl Migrate for FakeDriver {
    async fn offer(&self, id: InstanceId) -> DriverResult<Offer> {
        let (live, run, machine) = self.with_guest(id, |guest, now| {
            let machine = json!({"vcpus_milli": guest.spec.vcpus_milli, "memory": guest.spec.memory});
            (guest.is_live(now), guest.run, machine)
        })?;
        if !live {
            return Err(DriverError::permanent("not_running", format!("instance {id} does not run")));
        }
        Ok(Offer { driver: "fake".into(), run, machine, disks: Vec::new() })
    }

    async fn send_disk(&self, id: InstanceId, disk: &str, _stream: BoxDuplex) -> DriverResult<()> {
        Err(DriverError::permanent("no_such_disk", format!("instance {id} has no disk {disk:?}")))
    }

    async fn send_memory(&self, id: InstanceId, _limits: Limits, stream: BoxDuplex) -> DriverResult<()> {
        self.with_guest(id, |guest, now| {
            guest.outgoing = Some(Outgoing { begun: now, stream: Some(stream), stage: None });
        })
    }

    async fn sending(&self, id: InstanceId, memory: bool) -> DriverResult<Sending> {
        self.with_guest(id, |guest, now| {
            let stage = guest.outgoing.as_ref().filter(|_| memory).map_or(Stage::Idle, |out| out.stage(now));
            Sending { total: 6, remaining: if stage == Stage::Sent { 0 } else { 6 }, ..Sending::at(stage) }
        })
    }

    async fn finish_sending(&self, id: InstanceId) -> DriverResult<()> {
        let taken = self.with_guest(id, |guest, now| {
            let out = guest.outgoing.as_mut().filter(|out| out.stage(now) == Stage::Paused)?;
            out.stream.take()
        })?;
        let Some(mut stream) = taken else {
            return Err(DriverError::permanent("not_paused", format!("instance {id} does not stand still")));
        };
        let sent = async {
            stream.write_all(MEMORY).await?;
            stream.flush().await
        };
        let stage = if sent.await.is_ok() { Stage::Sent } else { Stage::Failed };
        self.with_guest(id, |guest, _| guest.outgoing.iter_mut().for_each(|out| out.stage = Some(stage)))?;
        if stage == Stage::Sent {
            return Ok(());
        }
        Err(DriverError::permanent("migration_failed", "the connection to the other node ended"))
    }

    async fn stop_sending(&self, id: InstanceId) -> DriverResult<()> {
        let _ = self.with_guest(id, |guest, _| guest.outgoing = None);
        Ok(())
    }

    async fn expect(&self, spec: &GuestSpec, offer: &Offer) -> DriverResult<()> {
        let here = json!({"vcpus_milli": spec.vcpus_milli, "memory": spec.memory});
        if offer.driver != "fake" || offer.machine != here {
            return Err(DriverError::permanent("machine_differs", "the machine would not be the same here"));
        }
        let (script, mut state) = (super::Script::from_spec(spec)?, self.world().lock());
        let script = state.scripts.get(&spec.id).cloned().or(script).unwrap_or_else(|| state.default.clone());
        let guest = state.guests.entry(spec.id).or_insert_with(|| Guest::new(spec, script));
        if guest.begun.is_some() {
            return Err(DriverError::permanent("already_here", format!("instance {} has run here", spec.id)));
        }
        guest.spec = spec.clone();
        guest.run = spec.run;
        guest.incoming = Some(Incoming::default());
        Ok(())
    }

    async fn accept(&self, id: InstanceId, lane: &Lane) -> DriverResult<BoxDuplex> {
        if *lane != Lane::Memory {
            return Err(DriverError::permanent("no_such_disk", format!("instance {id} has no disks")));
        }
        let (ours, theirs) = tokio::io::duplex(1024);
        let waits = self.with_guest(id, |guest, _| {
            guest.incoming.as_mut().map(|incoming| incoming.stream = Some(Box::new(theirs)))
        })?;
        waits.ok_or_else(|| DriverError::permanent("not_waiting", format!("instance {id} does not wait")))?;
        Ok(Box::new(ours))
    }

    async fn arrived(&self, id: InstanceId) -> DriverResult<bool> {
        let taken = self.with_guest(id, |guest, _| match &mut guest.incoming {
            Some(incoming) if !incoming.whole => incoming.stream.take().map_or(Ok(false), Err),
            _ => Ok(true),
        })?;
        let mut stream = match taken {
            Ok(known) => return Ok(known),
            Err(stream) => stream,
        };
        let mut memory = [0u8; MEMORY.len()];
        let whole = tokio::time::timeout(LOOK, stream.read_exact(&mut memory)).await.is_ok_and(|r| r.is_ok());
        self.with_guest(id, |guest, _| {
            if let Some(incoming) = &mut guest.incoming {
                incoming.whole = whole && memory == *MEMORY;
                incoming.stream = Some(stream);
            }
        })?;
        Ok(whole)
    }

    async fn take_over(&self, id: InstanceId) -> DriverResult<Observation> {
        if !self.arrived(id).await? {
            return Err(DriverError::permanent("not_arrived", format!("instance {id} is not here as a whole")));
        }
        let wall = self.world().clock.now();
        let begun = self.with_guest(id, |guest, now| {
            let run = guest.incoming.take().map(|_| guest.spec.clone());
            run.map(|spec| {
                // It has started elsewhere, long ago.
                guest.begin(&spec, now.checked_sub(guest.script.start_delay).unwrap_or(now), wall);
                spec.run
            })
        })?;
        if let Some(run) = begun {
            *self.world().lock().starts.entry((id, run)).or_default() += 1;
        }
        self.observe(id).await
    }
}
