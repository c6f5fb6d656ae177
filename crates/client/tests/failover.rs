//! What a client does when servers refuse, break, freeze and come back.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::collections::{BTreeMap, VecDeque};
use std::io::{Error, ErrorKind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use oblak_client::{Auth, Body, Client, ClientConfig, ClientError, ListOptions, Transport, WatchEvent};
use oblak_model::{ApiError, Code, Flavor, FlavorKind, FlavorSpec, Revision};
use oblak_platform::{clock, random};

/// What a server does with the next request.
#[derive(Clone)]
enum Does {
    Answer(StatusCode, String),
    /// The pieces, then the connection breaks.
    Stream(Vec<String>),
    /// Nobody listens.
    Refuse,
    /// The connection breaks; the request may have been carried out.
    Break,
    /// Nothing comes.
    Hang,
}

/// One request as a server saw it.
#[derive(Clone, Debug)]
struct Saw {
    host: String,
    line: String,
    key: Option<String>,
}

#[derive(Default)]
struct State {
    plans: BTreeMap<String, VecDeque<Does>>,
    saw: Vec<Saw>,
}

/// Servers that do what they are told; without a word they refuse.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<State>>);

impl Servers {
    fn will(&self, host: &str, does: impl IntoIterator<Item = Does>) {
        self.0.lock().unwrap().plans.entry(host.into()).or_default().extend(does);
    }

    fn saw(&self) -> Vec<Saw> {
        std::mem::take(&mut self.0.lock().unwrap().saw)
    }

    fn hosts(&self) -> Vec<String> {
        self.saw().into_iter().map(|s| s.host).collect()
    }

    fn client(&self) -> Client {
        let mut config = ClientConfig::new("https://a", "", Auth::None);
        config.others = vec!["https://b".into(), "https://c".into()];
        Client::in_process(&config, Arc::new(self.clone()), clock::system(), random::system()).unwrap()
    }
}

impl Transport for Servers {
    fn call(&self, request: Request<Body>) -> BoxFuture<'static, std::io::Result<Response<Body>>> {
        let host = request.uri().host().unwrap().to_string();
        let line = format!("{} {}", request.method(), request.uri().path_and_query().unwrap());
        let key = request.headers().get("idempotency-key").map(|v| v.to_str().unwrap().to_string());
        let does = {
            let mut state = self.0.lock().unwrap();
            state.saw.push(Saw { host: host.clone(), line, key });
            state.plans.get_mut(&host).and_then(VecDeque::pop_front).unwrap_or(Does::Refuse)
        };
        async move {
            let whole = |text: String| Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
            match does {
                Does::Answer(status, text) => Ok(Response::builder().status(status).body(whole(text)).unwrap()),
                Does::Stream(pieces) => {
                    let broken = Error::new(ErrorKind::ConnectionReset, "broken");
                    let frames = pieces.into_iter().map(|p| Ok(hyper::body::Frame::data(Bytes::from(p))));
                    let frames: Vec<_> = frames.chain([Err(broken)]).collect();
                    Ok(Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync()))
                }
                Does::Refuse => Err(Error::new(ErrorKind::ConnectionRefused, "nobody listens")),
                Does::Break => Err(Error::new(ErrorKind::ConnectionReset, "the connection broke")),
                Does::Hang => std::future::pending().await,
            }
        }
        .boxed()
    }
}

fn flavor(name: &str) -> Flavor {
    Flavor::new(name, FlavorSpec::default())
}

fn good() -> Does {
    Does::Answer(StatusCode::OK, serde_json::to_string(&flavor("xs")).unwrap())
}

fn problem(code: Code) -> Does {
    let error = ApiError::new(code, "no");
    Does::Answer(StatusCode::from_u16(error.status).unwrap(), serde_json::to_string(&error).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_call_goes_to_the_next_server_and_stays_there() {
    let servers = Servers::default();
    let client = servers.client();
    servers.will("b", [problem(Code::Unavailable)]);
    servers.will("c", [good(), good()]);
    client.get::<FlavorKind>("", "xs").await.unwrap();
    client.get::<FlavorKind>("", "xs").await.unwrap();
    assert_eq!(servers.hosts(), ["a", "b", "c", "c"]);
    assert_eq!((client.server().as_str(), client.servers().len()), ("https://c", 3));
    // What a server decides is decided.
    servers.will("c", [problem(Code::NotFound)]);
    assert_eq!(client.get::<FlavorKind>("", "xs").await.unwrap_err().code(), Some(Code::NotFound));
    assert_eq!(servers.hosts(), ["c"]);
    // When nobody is there it ends, after one try each.
    assert!(matches!(client.get::<FlavorKind>("", "xs").await, Err(ClientError::Unreachable { .. })));
    assert_eq!(servers.hosts().len(), 3);
    // A pinned client goes nowhere else.
    let only = client.only("https://b").unwrap();
    assert!(only.get::<FlavorKind>("", "xs").await.is_err());
    assert_eq!(servers.hosts(), ["b"]);
}

#[tokio::test(start_paused = true)]
async fn a_frozen_server_leaves_time_for_another() {
    let servers = Servers::default();
    let client = servers.client();
    servers.will("a", [Does::Hang]);
    servers.will("b", [good()]);
    let begun = tokio::time::Instant::now();
    client.get::<FlavorKind>("", "xs").await.unwrap();
    assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
    assert_eq!(client.within(Duration::from_secs(1)).server(), "https://b", "what one learns the other knows");
}

#[tokio::test(start_paused = true)]
async fn only_what_may_be_repeated_is_repeated() {
    let servers = Servers::default();
    let client = servers.client();
    servers.will("a", [Does::Break]);
    servers.will("b", [Does::Answer(StatusCode::CREATED, serde_json::to_string(&flavor("new")).unwrap())]);
    client.create("", &flavor("new")).await.unwrap();
    let saw = servers.saw();
    assert_eq!(saw.iter().map(|s| s.host.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(saw[0].key.is_some() && saw[0].key == saw[1].key, "{saw:?}");

    // A replacement may have been carried out when the connection breaks: nobody sends it again unasked.
    servers.will("b", [Does::Break]);
    assert!(client.replace(&flavor("xs")).await.unwrap_err().is_unsure());
    assert_eq!(servers.hosts(), ["b"]);
    // When it was not sent there is no doubt.
    servers.will("a", [good()]);
    client.replace(&flavor("xs")).await.unwrap();
    assert_eq!(servers.hosts(), ["c", "a"]);

    // A deletion whose answer was lost, and that had been carried out.
    servers.will("a", [Does::Break]);
    servers.will("b", [problem(Code::NotFound)]);
    client.delete::<FlavorKind>("", "xs").await.unwrap();
    assert_eq!(servers.hosts(), ["a", "b"]);
}

fn put(n: u64) -> String {
    let object = serde_json::to_string(&flavor(&format!("f{n}"))).unwrap();
    format!("event: put\nid: 1-{n}\ndata: {object}\n\n")
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_at_another_server_where_it_ended() {
    let servers = Servers::default();
    let client = servers.client();
    let bookmark = "event: bookmark\nid: 1-8\ndata: {\"revision\":\"1-8\"}\n\n".to_string();
    let gone = serde_json::to_string(&ApiError::new(Code::Compacted, "gone")).unwrap();
    // Half an event is none. A server that ends a watch may still be the one to ask; here it is gone.
    servers.will("a", [Does::Stream(vec![put(6), put(7)[..20].into()])]);
    servers.will("b", [Does::Stream(vec![put(7), bookmark])]);
    servers.will("c", [Does::Stream(vec![format!("event: error\ndata: {gone}\n\n")])]);
    let mut watch = client.watch::<FlavorKind>("", Revision::new(1, 5), &ListOptions::default()).await.unwrap();
    let mut seen = Vec::new();
    let refused = loop {
        match watch.next().await {
            Ok(WatchEvent::Put(object, at)) => seen.push(format!("{} {at}", object.metadata.name)),
            Ok(WatchEvent::Bookmark(at)) => seen.push(at.to_string()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(seen, ["f6 1-6", "f7 1-7", "1-8"], "each once and in order");
    assert_eq!(refused.code(), Some(Code::Compacted));
    let lines: Vec<String> = servers.saw().into_iter().map(|s| format!("{} {}", s.host, s.line)).collect();
    let from = |host: &str, at: &str| format!("{host} GET /v1/flavors?watch=true&from={at}");
    assert_eq!(lines[0], from("a", "1-5"));
    assert!(lines.contains(&from("b", "1-6")) && lines.contains(&from("c", "1-8")), "{lines:?}");
}

#[tokio::test(start_paused = true)]
async fn a_watch_says_that_nobody_answers_and_gives_up_in_the_end() {
    let servers = Servers::default();
    let client = servers.client();
    servers.will("a", [Does::Stream(vec![put(6)])]);
    let mut watch = client.watch::<FlavorKind>("", Revision::new(1, 5), &ListOptions::default()).await.unwrap();
    assert!(matches!(watch.next().await, Ok(WatchEvent::Put(..))));
    let waited = tokio::time::timeout(Duration::from_secs(5), watch.next()).await;
    assert!(waited.is_err());
    assert!(watch.interrupted().is_some_and(|why| why.contains("nobody listens")), "{:?}", watch.interrupted());
    // It comes back.
    servers.will("b", [Does::Stream(vec![put(7)])]);
    assert!(matches!(watch.next().await, Ok(WatchEvent::Put(..))));
    assert_eq!(watch.interrupted(), None);
    let begun = tokio::time::Instant::now();
    assert!(matches!(watch.next().await, Err(ClientError::Unreachable { .. })));
    assert!(begun.elapsed() < Duration::from_secs(90), "{:?}", begun.elapsed());
}
