//! The network between clients, agents and the control plane: calls of the real router, with everything that can go wrong on the way.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody};
use oblak_api::PeerNode;
use oblak_client::{Body, Transport};
use oblak_model::NodeId;
use oblak_platform::task::Process;
use tokio::sync::{mpsc, oneshot};
use tower::ServiceExt;

use crate::chance::Dice;
use crate::trace::Trace;

/// Frames of a stream on their way.
const FRAMES: usize = 64;
/// A server drops a stream whose frames do not get through for so long.
const STALLED: Duration = Duration::from_secs(20);

/// What the network does to messages now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Requests that never arrive, per thousand.
    pub lost_requests: u32,
    /// Answers that never arrive, per thousand.
    pub lost_answers: u32,
    /// Requests that arrive a second time later, per thousand; only such that a retry may repeat.
    pub doubled: u32,
    /// Longest delay of a message.
    pub delay: Duration,
}

/// Which directions of a link are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Nothing reaches the server.
    pub up: bool,
    /// Nothing comes back.
    pub down: bool,
}

struct State {
    weather: Weather,
    cuts: BTreeMap<String, Cut>,
    servers: BTreeMap<String, (Router, Process)>,
    dice: Dice,
}

/// The network. Clones are the same one.
#[derive(Clone)]
pub struct Net {
    state: Arc<Mutex<State>>,
    trace: Trace,
}

/// One request's fate, decided when it is sent.
struct Fate {
    out: Duration,
    back: Duration,
    lost: bool,
    answer_lost: bool,
    again: Option<Duration>,
    /// Whether a loss shows at once (reset) or only by silence.
    reset: bool,
}

impl Net {
    /// A perfect network without a server.
    #[must_use]
    pub fn new(seed: u64, trace: Trace) -> Self {
        let state = State {
            weather: Weather::default(),
            cuts: BTreeMap::new(),
            servers: BTreeMap::new(),
            dice: Dice::new(seed, "network"),
        };
        Self { state: Arc::new(Mutex::new(state)), trace }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the weather.
    pub fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Cuts, or mends, the link of one party.
    pub fn cut(&self, who: &str, cut: Cut) {
        self.lock().cuts.insert(who.into(), cut);
    }

    /// Mends everything.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.weather = Weather::default();
        state.cuts.clear();
    }

    /// Connects a server under its host name, or nobody.
    pub fn serve(&self, host: &str, server: Option<(Router, Process)>) {
        match server {
            Some(server) => self.lock().servers.insert(host.into(), server),
            None => self.lock().servers.remove(host),
        };
    }

    /// The link of one party; `node` says as which node it is authenticated.
    #[must_use]
    pub fn link(&self, who: &str, node: Option<NodeId>) -> Arc<Link> {
        Arc::new(Link { net: self.clone(), who: who.into(), node })
    }

    fn cut_of(&self, who: &str) -> Cut {
        self.lock().cuts.get(who).copied().unwrap_or_default()
    }

    fn fate(&self, repeatable: bool) -> Fate {
        let mut state = self.lock();
        let weather = state.weather;
        let dice = &mut state.dice;
        let least = Duration::from_micros(100);
        let delay = |dice: &mut Dice| {
            // Most messages are quick; one in ten is not.
            let most = if dice.permille(100) { weather.delay } else { weather.delay / 20 };
            dice.between(least, most.max(Duration::from_micros(400)))
        };
        let (out, back) = (delay(dice), delay(dice));
        let lost = dice.permille(weather.lost_requests);
        let answer_lost = dice.permille(weather.lost_answers);
        let again = dice.permille(weather.doubled) && repeatable;
        let again = again.then(|| delay(dice));
        Fate { out, back, lost, answer_lost, again, reset: dice.permille(500) }
    }
}

/// How one party reaches the server.
pub struct Link {
    net: Net,
    who: String,
    node: Option<NodeId>,
}

impl Transport for Link {
    fn call(&self, request: Request<Body>) -> BoxFuture<'static, std::io::Result<Response<Body>>> {
        let link = Self { net: self.net.clone(), who: self.who.clone(), node: self.node };
        Box::pin(link.carry(request))
    }
}

fn reset() -> Error {
    Error::new(ErrorKind::ConnectionReset, "the connection broke")
}

/// Nobody hears anything any more: the caller's deadline ends it.
async fn silence<T>() -> T {
    std::future::pending().await
}

impl Link {
    async fn carry(self, request: Request<Body>) -> std::io::Result<Response<Body>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let repeatable =
            head.headers.contains_key("idempotency-key") || (self.node.is_some() && head.method == http::Method::POST);
        let what = format!("{} {}", head.method, head.uri.path());
        let fate = self.net.fate(repeatable);
        tokio::time::sleep(fate.out).await;
        if fate.lost || self.net.cut_of(&self.who).up {
            self.note(format_args!("{what} lost"));
            return if fate.reset { Err(reset()) } else { silence().await };
        }
        let host = head.uri.host().unwrap_or_default();
        let Some((router, process)) = self.net.lock().servers.get(host).cloned() else {
            return Err(Error::new(ErrorKind::ConnectionRefused, "nobody listens"));
        };
        if let Some(later) = fate.again {
            let (router, request) = (router.clone(), self.rebuild(&head, &body));
            let (note, what) = (self.net.trace.clone(), what.clone());
            let who = self.who.clone();
            process.spawn(async move {
                tokio::time::sleep(later).await;
                let status = answer(router, request).await.status().as_u16();
                note.note(&who, format_args!("{what} again: {status}"));
            });
        }
        let response = self.ask(&process, router, self.rebuild(&head, &body)).await;
        let Ok(response) = response else {
            self.note(format_args!("{what} broke"));
            return Err(reset());
        };
        tokio::time::sleep(fate.back).await;
        if fate.answer_lost || self.net.cut_of(&self.who).down {
            self.note(format_args!("{what} {} lost on the way back", response.status().as_u16()));
            return if fate.reset { Err(reset()) } else { silence().await };
        }
        self.note(format_args!("{what} {}", response.status().as_u16()));
        Ok(response)
    }

    fn note(&self, what: std::fmt::Arguments<'_>) {
        self.net.trace.note(&self.who, what);
    }

    fn rebuild(&self, head: &http::request::Parts, body: &Bytes) -> Request<axum::body::Body> {
        let mut request = Request::new(axum::body::Body::from(body.clone()));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = head.uri.path_and_query().map_or_else(http::Uri::default, |p| p.clone().into());
        *request.headers_mut() = head.headers.clone();
        if let Some(node) = self.node {
            request.extensions_mut().insert(PeerNode(node));
        }
        request
    }

    /// Runs the handler as a task of the server: the caller's end does not end it, the server's does.
    async fn ask(
        &self,
        process: &Process,
        router: Router,
        request: Request<axum::body::Body>,
    ) -> Result<Response<Body>, oneshot::error::RecvError> {
        let (sender, receiver) = oneshot::channel();
        let (net, who) = (self.net.clone(), self.who.clone());
        process.spawn(async move {
            let response = answer(router, request).await;
            let (head, body) = response.into_parts();
            let stream = head.headers.get(http::header::CONTENT_TYPE).is_some_and(|t| t == "text/event-stream");
            if stream {
                let (frames, out) = mpsc::channel(FRAMES);
                let _ = sender.send(Response::from_parts(head, streamed(out)));
                pump(&net, &who, body, frames).await;
            } else {
                let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                let whole = Full::new(bytes).map_err(|never| match never {}).boxed_unsync();
                let _ = sender.send(Response::from_parts(head, whole));
            }
        });
        receiver.await
    }
}

async fn answer(router: Router, request: Request<axum::body::Body>) -> Response<axum::body::Body> {
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

type Frames = mpsc::Sender<std::io::Result<Bytes>>;

/// Carries the frames of a stream. While the link is cut they wait; when that takes too long the server drops the stream, and the caller learns of it
/// only if it can be told.
async fn pump(net: &Net, who: &str, body: axum::body::Body, frames: Frames) {
    let mut body = body;
    loop {
        let frame = tokio::select! {
            biased;
            () = frames.closed() => return,
            frame = body.frame() => frame,
        };
        let Some(Ok(frame)) = frame else { break };
        let Ok(data) = frame.into_data() else { continue };
        let mut waited = Duration::ZERO;
        while net.cut_of(who).down || net.cut_of(who).up {
            if waited >= STALLED {
                net.trace.note(who, "a stream was dropped, and nobody was told");
                // The body ends here, but the receiver stays open for ever: a connection of which one end is gone.
                drop(body);
                frames.closed().await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            waited += Duration::from_millis(200);
        }
        if frames.send(Ok(data)).await.is_err() {
            return;
        }
    }
    // An orderly end of the stream: told when it can be told.
    let _ = frames.send(Err(reset())).await;
}

fn streamed(mut frames: mpsc::Receiver<std::io::Result<Bytes>>) -> Body {
    let stream = futures_util::stream::poll_fn(move |context| {
        frames.poll_recv(context).map(|item| item.map(|frame| frame.map(hyper::body::Frame::data)))
    });
    StreamBody::new(stream).boxed_unsync()
}
