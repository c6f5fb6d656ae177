//! The connection between two agents: one line that says what is wanted, one that answers, then the bytes of that lane.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use oblak_compute::migrate::{Lane, Offer};
use oblak_model::{Instance, InstanceId, NodeId};
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::context::Context;

use super::target;

/// Longest line; an offer holds the flags of a processor.
const MAX_LINE: usize = 64 * 1024;
/// How long the other side may take for its line. A target starts its emulator before it answers.
const LINE_DEADLINE: Duration = Duration::from_secs(120);
/// How long a stranger may take to say what it wants.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);
/// Connections served at once.
const MAX_STREAMS: usize = 64;
/// Pause before the listener is opened again, or its address looked for.
const AGAIN: Duration = Duration::from_secs(1);

/// First line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Which instance.
    pub instance: InstanceId,
    /// Which migration of it.
    pub generation: u64,
    /// What for.
    pub wants: Wants,
}

/// What a connection is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wants {
    /// Make a guest that waits for this one.
    Offer(Box<Offer>),
    /// A lane into it.
    Lane(Lane),
    /// Whether it is there as a whole.
    Arrived,
    /// Files of an instance that does not run, as a tar stream until the end; answered by a second line.
    Files,
}

/// Answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Yes.
    Ok,
    /// No.
    Error {
        /// Stable code.
        code: String,
        /// For people.
        detail: String,
    },
}

fn broken(error: &std::io::Error) -> DriverError {
    DriverError::retry("peer_lost", format!("the connection to the other node broke: {error}"))
}

/// Reads one line and nothing behind it.
async fn line(stream: &mut BoxDuplex, deadline: Duration) -> DriverResult<Vec<u8>> {
    let read = async {
        let mut line = Vec::new();
        loop {
            let byte = stream.read_u8().await.map_err(|e| broken(&e))?;
            if byte == b'\n' {
                return Ok(line);
            }
            line.push(byte);
            if line.len() > MAX_LINE {
                return Err(DriverError::permanent("malformed", "the line of the other node is too long"));
            }
        }
    };
    let late = || DriverError::retry("peer_lost", "the other node does not answer");
    tokio::time::timeout(deadline, read).await.map_err(|_| late())?
}

async fn say(stream: &mut BoxDuplex, what: &impl Serialize) -> DriverResult<()> {
    let mut text = serde_json::to_vec(what).map_err(|e| DriverError::permanent("internal", e.to_string()))?;
    text.push(b'\n');
    stream.write_all(&text).await.map_err(|e| broken(&e))?;
    stream.flush().await.map_err(|e| broken(&e))
}

/// The answer of the other side.
pub async fn answered(stream: &mut BoxDuplex) -> DriverResult<()> {
    let text = line(stream, LINE_DEADLINE).await?;
    match serde_json::from_slice(&text) {
        Ok(Answer::Ok) => Ok(()),
        Ok(Answer::Error { code, detail }) => Err(DriverError::permanent(&code, detail)),
        Err(e) => Err(DriverError::permanent("malformed", format!("the other node's answer cannot be read: {e}"))),
    }
}

/// Opens a connection to the target and says what it is for; answered with yes.
pub async fn ask(ctx: &Context, to: NodeId, address: SocketAddr, hello: &Hello) -> DriverResult<BoxDuplex> {
    let peers = ctx.peers.as_ref().ok_or_else(unreachable_here)?;
    let dialled = tokio::time::timeout(DIAL_DEADLINE, peers.dial(to, address)).await;
    let late = || DriverError::retry("peer_unreachable", format!("node {to} cannot be reached at {address}"));
    let mut stream = dialled.map_err(|_| late())?.map_err(|e| {
        DriverError::retry("peer_unreachable", format!("node {to} cannot be reached at {address}: {e}"))
    })?;
    say(&mut stream, hello).await?;
    answered(&mut stream).await?;
    Ok(stream)
}

/// This agent has no way to others.
pub fn unreachable_here() -> DriverError {
    DriverError::unsupported("this node has no connection to others: its agent has no underlay address")
}

/// Listens for other agents until this one ends. The address is told in [`Context::listening`].
pub async fn listen(ctx: Arc<Context>) {
    let Some(peers) = ctx.peers.clone() else { return };
    let slots = Arc::new(tokio::sync::Semaphore::new(MAX_STREAMS));
    while !ctx.cancel.is_cancelled() {
        let underlay = ctx.world().node.as_ref().and_then(|n| n.status.facts.underlay).map(|u| u.address);
        let Some(address) = underlay else {
            pause(&ctx).await;
            continue;
        };
        let mut listener = match peers.listen(address).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%address, %error, "other nodes cannot reach this one");
                pause(&ctx).await;
                continue;
            }
        };
        ctx.listening.send_replace(Some(listener.address));
        loop {
            let arrived = tokio::select! {
                arrived = listener.arrivals.recv() => arrived,
                () = ctx.cancel.cancelled() => return,
            };
            let Some((peer, stream)) = arrived else { break };
            let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
            let ctx = ctx.clone();
            oblak_platform::task::spawn(async move {
                let cancel = ctx.cancel.clone();
                tokio::select! { () = serve(&ctx, peer, stream) => {}, () = cancel.cancelled() => {} }
                drop(slot);
            });
        }
        ctx.listening.send_replace(None);
    }
}

async fn pause(ctx: &Context) {
    tokio::select! { () = tokio::time::sleep(AGAIN) => {}, () = ctx.cancel.cancelled() => {} }
}

async fn serve(ctx: &Arc<Context>, peer: NodeId, mut stream: BoxDuplex) {
    let hello = line(&mut stream, HELLO_DEADLINE).await.and_then(|text| {
        serde_json::from_slice::<Hello>(&text).map_err(|e| DriverError::permanent("malformed", e.to_string()))
    });
    let outcome = async {
        let hello = hello?;
        let instance = allowed(ctx, peer, &hello)?;
        tracing::debug!(instance = %instance.metadata.name, %peer, "a node sends");
        one(ctx, &instance, hello.wants, &mut stream).await
    };
    if let Err(error) = outcome.await {
        tracing::debug!(%peer, %error, "a connection of another node was refused or broke");
        let _ = say(&mut stream, &Answer::Error { code: error.code, detail: error.detail }).await;
    }
    let _ = stream.shutdown().await;
}

/// The instance, if the node that the certificate names may send it to here now.
fn allowed(ctx: &Context, peer: NodeId, hello: &Hello) -> DriverResult<Arc<Instance>> {
    let instance = ctx.world().instances.get(&hello.instance).cloned();
    let open = |i: &Arc<Instance>| {
        i.status
            .open_migration()
            .is_some_and(|m| m.from == peer && m.to == ctx.config.node && m.generation == hello.generation)
    };
    instance
        .filter(open)
        .ok_or_else(|| DriverError::permanent("not_expected", "no instance is to move from that node to this one now"))
}

async fn one(ctx: &Arc<Context>, instance: &Arc<Instance>, wants: Wants, stream: &mut BoxDuplex) -> DriverResult<()> {
    match wants {
        Wants::Offer(offer) => {
            target::expect(ctx, instance, &offer).await?;
            say(stream, &Answer::Ok).await
        }
        Wants::Lane(lane) => {
            let mut guest = target::accept(ctx, instance, &lane).await?;
            say(stream, &Answer::Ok).await?;
            let copied = tokio::io::copy_bidirectional_with_sizes(stream, &mut guest, 256 * 1024, 256 * 1024).await;
            tracing::debug!(?copied, ?lane, "a lane ended");
            Ok(())
        }
        Wants::Arrived => {
            target::arrived(ctx, instance).await?;
            say(stream, &Answer::Ok).await
        }
        Wants::Files => {
            say(stream, &Answer::Ok).await?;
            target::files(ctx, instance, stream).await?;
            say(stream, &Answer::Ok).await
        }
    }
}
