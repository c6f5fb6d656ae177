//! What is fuzzed: one function per parser. Each asserts what must hold for any input and gives its outcome.

use std::fmt::Debug;
use std::io::Cursor;
use std::sync::OnceLock;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use oblak_identity::{join, pki};
use oblak_model::wire::{Apply, Heartbeat, Register, Report, StreamRequest};
use oblak_model::{Object, Problems, Size, Span, Timestamp, for_each_kind, name, selector};
use oblak_netd::metadata::{self, Asker, token::Secret};
use oblak_netd::view::{View, World};
use oblak_netd::{dhcp, dns};
use oblak_platform::frame::{Frame, FrameCodec};
use serde::{Serialize, de::DeserializeOwned};
use tokio_util::codec::{Decoder, Encoder};

/// One parser.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also of the directory of its seeds.
    pub name: &'static str,
    /// Feeds it. The result tells one outcome from another.
    pub call: fn(&[u8]) -> Vec<u8>,
    /// Longest input in bytes.
    pub limit: usize,
}

macro_rules! targets {
    ($($name:ident $limit:literal,)*) => {
        /// Every target.
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), call: $name, limit: $limit },)*];
    };
}

targets! {
    certificate 8_192,
    cursor 1_024,
    dhcp_request 1_600,
    disk 131_072,
    dns_query 1_600,
    frames 4_096,
    join_token 512,
    layer 65_536,
    manifest 8_192,
    meta 4_096,
    objects 8_192,
    qmp 4_096,
    reference 1_024,
    registry 8_192,
    shim 4_096,
    sse 4_096,
    wire 8_192,
    words 256,
}

/// What came of it: the beginning of an error, which names its kind, or the mark of success.
fn outcome<T, E: Debug>(result: &Result<T, E>) -> Vec<u8> {
    match result {
        Ok(_) => b"ok".to_vec(),
        Err(error) => shape(&format!("{error:?}")),
    }
}

/// Numbers and quoted parts of the input would make every outcome a new one.
fn shape(text: &str) -> Vec<u8> {
    text.bytes().filter(u8::is_ascii_alphabetic).take(48).collect()
}

fn text(input: &[u8]) -> String {
    String::from_utf8_lossy(input).into_owned()
}

/// A value that was understood says the same when it is written and read again.
fn json<T: DeserializeOwned + Serialize>(input: &[u8]) -> Vec<u8> {
    let first = serde_json::from_slice::<T>(input);
    if let Ok(value) = &first {
        let once = serde_json::to_string(value).expect("what was read can be written");
        let again: T = serde_json::from_str(&once).unwrap_or_else(|e| panic!("{e}: {once}"));
        assert_eq!(serde_json::to_string(&again).expect("as before"), once);
    }
    outcome(&first)
}

/// Certificates and requests for them, from nodes.
fn certificate(input: &[u8]) -> Vec<u8> {
    let _ = (pki::node_of_certificate(input), pki::end_of_certificate(input));
    outcome(&pki::key_of_csr(&text(input)))
}

/// Cursors of lists, from clients.
fn cursor(input: &[u8]) -> Vec<u8> {
    outcome(&oblak_api::fuzzing::cursor(&text(input)))
}

/// Requests for addresses, from guests.
fn dhcp_request(input: &[u8]) -> Vec<u8> {
    let reply = dhcp::answer(view(), input);
    if let Some(reply) = &reply {
        // BOOTP's smallest message (RFC 951), and an answer to nobody but the port.
        assert!(reply.bytes.len() >= 236 && reply.bytes.len() <= 1500, "{} bytes", reply.bytes.len());
        assert_eq!(reply.bytes[0], 2, "an answer");
    }
    // Type of the answer: the value of option 53 lies right after the magic in what we write.
    reply.map_or_else(
        || vec![u8::from(dhcp::client_mac(input).is_some())],
        |r| r.bytes[240..r.bytes.len().min(243)].to_vec(),
    )
}

/// Headers of disk images, from users and the web.
fn disk(input: &[u8]) -> Vec<u8> {
    outcome(&on_disk("disk", input, oblak_image::fuzzing::disk))
}

/// Questions about names, from guests.
fn dns_query(input: &[u8]) -> Vec<u8> {
    let mut seen = Vec::new();
    for transport in [dns::Transport::Udp, dns::Transport::Tcp] {
        match dns::answer(view(), input, transport) {
            dns::Outcome::Answer(bytes) => {
                assert!(bytes.len() >= dns::HEADER_BYTES && bytes[2] & 0x80 != 0, "an answer");
                assert_eq!(bytes[..2], input[..2], "to this question");
                // Response code and counts.
                seen.extend([bytes[3] & 15, bytes[7].min(3)]);
            }
            dns::Outcome::Forward(question) => {
                assert!(question.limit >= usize::from(dns::PLAIN_PAYLOAD), "room for an answer");
                seen.push(100);
            }
            dns::Outcome::Drop => seen.push(101),
        }
    }
    seen
}

/// Frames of streams, from clients, nodes and shims.
fn frames(input: &[u8]) -> Vec<u8> {
    let read = |pieces: &[&[u8]]| {
        let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                match FrameCodec.decode(&mut buffer) {
                    Ok(Some(frame)) => found.push(frame),
                    Ok(None) => break,
                    Err(_) => return (found, true),
                }
            }
        }
        (found, false)
    };
    let cut = input.last().map_or(0, |b| usize::from(*b) % (input.len() + 1));
    let (found, failed) = read(&[input]);
    assert_eq!(read(&[&input[..cut], &input[cut..]]), (found.clone(), failed), "pieces do not matter");
    let mut written = BytesMut::new();
    for frame in &found {
        let _ = frame.as_control();
        assert_eq!(Frame::from_message(frame.to_message()).as_ref(), Some(frame));
        FrameCodec.encode(frame.clone(), &mut written).expect("what was read can be written");
    }
    assert!(input.starts_with(&written));
    let message = Frame::from_message(Bytes::copy_from_slice(input));
    vec![u8::from(failed), found.len().min(9) as u8, message.map_or(9, |m| m.channel.code())]
}

/// Tokens of machines that join.
fn join_token(input: &[u8]) -> Vec<u8> {
    let parsed = text(input).parse::<join::JoinToken>();
    if let Ok(token) = &parsed {
        assert_eq!(token.reveal().parse::<join::JoinToken>().expect("its own text").secret(), token.secret());
    }
    outcome(&parsed)
}

/// Layers of OCI images, from registries. Whatever they hold, nothing appears outside of their tree.
fn layer(input: &[u8]) -> Vec<u8> {
    let dir = tempfile::Builder::new().prefix("fuzz-").tempdir_in("/dev/shm").expect("a directory in memory");
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).expect("our own directory");
    let policy = oblak_image::unpack::Policy { bytes: 1 << 20, entries: 200, device_nodes: false };
    let result = oblak_image::unpack::layer_into(Cursor::new(input), &tree, &policy, &mut || Ok(()));
    let beside = std::fs::read_dir(dir.path()).expect("our own directory").count();
    assert_eq!(beside, 1, "something appeared beside the tree");
    outcome(&result)
}

/// Files for `oblak apply`.
fn manifest(input: &[u8]) -> Vec<u8> {
    shape(&oblak_cli::fuzzing::documents(&text(input)))
}

/// Requests to the metadata service, from guests. `METHOD path`, then lines of headers.
fn meta(input: &[u8]) -> Vec<u8> {
    static SECRET: OnceLock<Secret> = OnceLock::new();
    let request = text(input);
    let mut lines = request.lines();
    let (method, path) = lines.next().unwrap_or_default().split_once(' ').unwrap_or_default();
    let Ok(method) = method.parse::<Method>() else { return b"method".to_vec() };
    let mut headers = HeaderMap::new();
    for (name, value) in lines.take(32).filter_map(|l| l.split_once(':')) {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.trim().parse::<HeaderValue>()) {
            headers.append(name, value);
        }
    }
    let world = World::default();
    let port = &view().plan.ports[0];
    let about = port.metadata.as_ref().expect("the first port has everything");
    let asker = Asker { world: &world, view: view(), port, metadata: about };
    let secret = SECRET.get_or_init(Secret::random);
    let reply = metadata::respond(Some(&asker), secret, Timestamp::from_micros(0), (&method, path, &headers));
    let nobody = metadata::respond(None, secret, Timestamp::from_micros(0), (&method, path, &headers));
    assert!(!nobody.status.is_success(), "a stranger is told nothing");
    assert!(reply.status.is_success() || !text(&reply.body).contains("ssh-ed25519"), "keys in an error");
    [&reply.status.as_u16().to_be_bytes()[..], &shape(&text(&reply.body))].concat()
}

/// Objects of every kind, from clients: read, judged, written again.
fn objects(input: &[u8]) -> Vec<u8> {
    macro_rules! each {
        ($($kind:path),*) => {{
            let mut seen = Vec::new();
            $(if let Ok(object) = serde_json::from_slice::<Object<$kind>>(input) {
                let good = object.validate().is_ok();
                let written = serde_json::to_vec(&object).expect("what was read can be written");
                let again = serde_json::from_slice::<Object<$kind>>(&written);
                let again = again.unwrap_or_else(|e| panic!("{e}: {}", text(&written)));
                assert_eq!(again, object);
                seen.extend([<$kind as oblak_model::Kind>::KIND.len() as u8, u8::from(good)]);
            })*
            seen
        }};
    }
    let seen = for_each_kind!(each);
    if seen.is_empty() { outcome(&serde_json::from_slice::<Object<oblak_model::InstanceKind>>(input)) } else { seen }
}

/// Lines of qemu's monitor and of the guest agent, which the guest controls.
fn qmp(input: &[u8]) -> Vec<u8> {
    let mut reader = oblak_compute_vm::qemu::qmp::LineReader::with_limit(input, 1000);
    let mut seen = Vec::new();
    block_on(async {
        while let Ok(Some(line)) = reader.next().await {
            seen = shape(&format!("{:?}", oblak_compute_vm::qemu::qmp::parse_line(&line)));
        }
    });
    seen
}

/// Names of images in registries.
fn reference(input: &[u8]) -> Vec<u8> {
    outcome(&oblak_image::fuzzing::reference(&text(input)))
}

/// What registries say: challenges, indexes, manifests, configurations.
fn registry(input: &[u8]) -> Vec<u8> {
    let header = oblak_image::fuzzing::challenge(&text(input));
    [&[u8::from(header)][..], &outcome(&oblak_image::fuzzing::documents(input))].concat()
}

/// Requests to shims.
fn shim(input: &[u8]) -> Vec<u8> {
    outcome(&oblak_compute::shim::server::parse_call(input))
}

/// Event streams, from the server.
fn sse(input: &[u8]) -> Vec<u8> {
    let all = |pieces: &[&[u8]]| {
        let mut parser = oblak_client::sse::Parser::default();
        let mut found = Vec::new();
        for piece in pieces {
            parser.push(piece);
            loop {
                match parser.next_event() {
                    Ok(Some(event)) => found.push(event),
                    Ok(None) => break,
                    Err(_) => return (found, true),
                }
            }
        }
        (found, false)
    };
    let cut = input.last().map_or(0, |b| usize::from(*b) % (input.len() + 1));
    let (whole, pieces) = (all(&[input]), all(&[&input[..cut], &input[cut..]]));
    assert_eq!(whole, pieces, "pieces do not matter");
    vec![whole.0.len().min(9) as u8, u8::from(whole.1), whole.0.first().map_or(0, |e| e.name.len().min(9) as u8)]
}

/// What nodes and clients say in JSON beside objects.
fn wire(input: &[u8]) -> Vec<u8> {
    [
        json::<Apply>(input),
        json::<Report>(input),
        json::<Register>(input),
        json::<Heartbeat>(input),
        json::<StreamRequest>(input),
    ]
    .concat()
}

/// Sizes, durations, times, names, selectors: what they understand they print so that they understand it again. Sizes and durations are
/// printed for people, rounded: there it only has to be understood.
fn words(input: &[u8]) -> Vec<u8> {
    let text = text(input);
    let mut problems = Problems::new();
    problems.add_some("/metadata/name", name::problem(&text));
    let _ = name::dotted_problem(&text);
    let size = text.parse::<Size>();
    if let Ok(size) = &size {
        let said = size.to_string();
        assert!(said.parse::<Size>().is_ok(), "{said}");
    }
    let span = text.parse::<Span>();
    if let Ok(span) = &span {
        let said = span.to_string();
        assert!(said.parse::<Span>().is_ok(), "{said}");
    }
    let time = text.parse::<Timestamp>();
    if let Ok(time) = &time {
        assert_eq!(time.to_string().parse::<Timestamp>().as_ref(), Ok(time));
    }
    let selector = text.parse::<selector::Selector>();
    if let Ok(selector) = &selector {
        assert_eq!(selector.to_string().parse::<selector::Selector>().as_ref(), Ok(selector));
    }
    [outcome(&size), outcome(&span), outcome(&time), outcome(&selector)].concat()
}

fn on_disk<T>(name: &str, input: &[u8], look: impl FnOnce(&std::path::Path) -> T) -> T {
    let dir = tempfile::Builder::new().prefix("fuzz-").tempdir_in("/dev/shm").expect("a directory in memory");
    let path = dir.path().join(name);
    std::fs::write(&path, input).expect("our own directory");
    look(&path)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

/// A network with two ports; the first has everything that metadata can tell.
fn view() -> &'static View {
    static VIEW: OnceLock<View> = OnceLock::new();
    VIEW.get_or_init(|| {
        let plan = serde_json::from_str(include_str!("network.json")).expect("our own file");
        View::new(plan).expect("our own file")
    })
}
