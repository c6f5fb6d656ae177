//! `forward` and `vnc`: connections into instances.

use std::net::SocketAddr;
use std::sync::Arc;

use oblak_client::{Client, FrameStream};
use oblak_model::{InstanceKind, Isolation};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::args::{ForwardArgs, VncArgs};
use crate::error::{CliError, Result};
use crate::session::Session;

/// Connections that are served at once.
const CONNECTIONS: usize = 256;
const CHUNK: usize = 32 * 1024;

/// Where connections lead.
#[derive(Clone, Copy, Debug)]
enum Target {
    Port(u16),
    Screen,
}

impl Target {
    async fn open(self, client: &Client, project: &str, name: &str) -> oblak_client::Result<FrameStream> {
        match self {
            Self::Port(port) => client.forward(project, name, port).await,
            Self::Screen => client.vnc(project, name).await,
        }
    }
}

/// `forward`.
pub async fn forward(session: &Session, args: &ForwardArgs) -> Result<()> {
    if args.stdio {
        return stdio(session, args).await;
    }
    let address = args.listen.unwrap_or(([127, 0, 0, 1], args.port).into());
    serve(session, &args.name, Target::Port(args.port), address).await
}

/// `vnc`.
pub async fn vnc(session: &Session, args: &VncArgs) -> Result<()> {
    serve(session, &args.name, Target::Screen, args.listen).await
}

/// One connection over standard input and output, as the `ProxyCommand` of ssh(1) wants it.
async fn stdio(session: &Session, args: &ForwardArgs) -> Result<()> {
    let stream = match session.client.forward(&session.project, &args.name, args.port).await {
        Ok(stream) => stream,
        Err(error) => return Err(session.explain_missing::<InstanceKind>(&args.name, error).await),
    };
    let (mut from_guest, mut to_guest) = tokio::io::split(stream.into_bytes());
    let inwards = async {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0u8; CHUNK];
        loop {
            match stdin.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => {
                    if to_guest.write_all(&buffer[..n]).await.is_err() || to_guest.flush().await.is_err() {
                        break;
                    }
                }
            }
        }
        let _ = to_guest.shutdown().await;
    };
    let outwards = async {
        let mut stdout = tokio::io::stdout();
        let mut buffer = vec![0u8; CHUNK];
        loop {
            let n = from_guest
                .read(&mut buffer)
                .await
                .map_err(|e| CliError::new(format!("the connection broke: {e}"), "try again"))?;
            if n == 0 {
                return Ok(());
            }
            stdout.write_all(&buffer[..n]).await.map_err(|e| CliError::output(&e))?;
            stdout.flush().await.map_err(|e| CliError::output(&e))?;
        }
    };
    tokio::pin!(inwards, outwards);
    // The end of our input does not end what still comes back.
    tokio::select! {
        end = &mut outwards => end,
        () = &mut inwards => outwards.await,
    }
}

async fn serve(session: &Session, name: &str, target: Target, address: SocketAddr) -> Result<()> {
    // A wrong name is said now and not at the first connection.
    let instance = session.get::<InstanceKind>(name).await?;
    if matches!(target, Target::Screen) && instance.status.resolved.isolation == Isolation::Container {
        return Err(CliError::new(
            format!("{name} is a container: it has no screen"),
            format!("use `oblak console {name}` or `oblak exec -it {name} -- sh`"),
        ));
    }
    let listener = TcpListener::bind(address).await.map_err(|e| {
        CliError::new(
            format!("cannot listen on {address}: {e}"),
            "choose another address with --listen, for example 127.0.0.1:0",
        )
    })?;
    let at = listener.local_addr().unwrap_or(address);
    match target {
        Target::Port(port) => session.out.note(&format!("forwarding {at} to port {port} of {name}; Ctrl-C ends")),
        Target::Screen => session.out.note(&format!("the screen of {name} is at vnc://{at}; Ctrl-C ends")),
    }
    if !at.ip().is_loopback() {
        session.out.note("note: others can reach this address too");
    }
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let (name, project): (Arc<str>, Arc<str>) = (name.into(), session.project.as_str().into());
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return Ok(()) };
        let (mut here, peer) = match listener.accept().await {
            Ok(pair) => pair,
            Err(e) => {
                session.out.note(&format!("a connection could not be taken: {e}"));
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = here.set_nodelay(true);
        let (client, name, project, out) =
            (session.client.clone(), Arc::clone(&name), Arc::clone(&project), session.out);
        tokio::spawn(async move {
            let _slot = slot;
            match target.open(&client, &project, &name).await {
                Ok(stream) => {
                    let mut there = stream.into_bytes();
                    if let Err(e) = tokio::io::copy_bidirectional(&mut here, &mut there).await {
                        out.note(&format!("connection of {peer}: {e}"));
                    }
                }
                Err(error) => out.error(&error.into()),
            }
        });
    }
}
