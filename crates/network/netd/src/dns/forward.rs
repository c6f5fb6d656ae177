//! Asks DNS servers outside. The sockets live in the namespace netd runs in, never in that of a network.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use oblak_platform::random::{Random, SystemRandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::cache::Cache;
use super::{EDNS_PAYLOAD, HEADER_BYTES, Question, Transport, failure};

/// Questions of all networks that wait for servers at one time.
const MAX_WAITING: usize = 512;
/// Questions of one network that wait for servers at one time.
const MAX_WAITING_PER_NETWORK: usize = 64;
/// How long one server may take: less than the usual client's retry after 5 s.
const TRY_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a question may take over all servers.
const TOTAL_TIMEOUT: Duration = Duration::from_millis(4500);
/// Servers asked (as many as a resolv.conf may name, resolv.conf(5)).
const MAX_SERVERS: usize = 3;
/// Rounds over the servers.
const ROUNDS: usize = 2;
/// How long a parsed resolv.conf is trusted without looking at the file again.
const RESOLV_CONF_AGE: Duration = Duration::from_secs(2);

/// What all networks share.
#[derive(Debug)]
pub struct Outside {
    resolv_conf: PathBuf,
    servers: RefCell<(Option<Instant>, Option<SystemTime>, Vec<IpAddr>)>,
    slots: Semaphore,
}

/// What one network has for itself.
#[derive(Debug)]
pub struct Forwarder {
    slots: Semaphore,
    cache: RefCell<Cache>,
}

impl Outside {
    /// Servers come from `resolv_conf` when a network names none.
    #[must_use]
    pub fn new(resolv_conf: &Path) -> Self {
        Self { resolv_conf: resolv_conf.into(), servers: RefCell::default(), slots: Semaphore::new(MAX_WAITING) }
    }

    fn servers(&self) -> Vec<IpAddr> {
        let mut known = self.servers.borrow_mut();
        if known.0.is_none_or(|at| at.elapsed() > RESOLV_CONF_AGE) {
            known.0 = Some(Instant::now());
            let changed = std::fs::metadata(&self.resolv_conf).and_then(|m| m.modified()).ok();
            if changed.is_none() || changed != known.1 {
                known.1 = changed;
                known.2 = std::fs::read_to_string(&self.resolv_conf).map(|text| nameservers(&text)).unwrap_or_default();
            }
        }
        known.2.clone()
    }
}

impl Default for Forwarder {
    fn default() -> Self {
        Self { slots: Semaphore::new(MAX_WAITING_PER_NETWORK), cache: RefCell::default() }
    }
}

impl Forwarder {
    /// The answer for the client; `None` when none can be made.
    pub async fn ask(
        &self,
        outside: &Outside,
        forwarders: &[IpAddr],
        question: &Question,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let cached = self.cache.borrow().get(question, Instant::now());
        if let Some(bytes) = cached {
            return Some(fit(bytes, question.limit));
        }
        let (Ok(_own), Ok(_all)) = (self.slots.try_acquire(), outside.slots.try_acquire()) else {
            return failure(question, ResponseCode::ServFail);
        };
        let servers = if forwarders.is_empty() { outside.servers() } else { forwarders.to_vec() };
        match timeout(TOTAL_TIMEOUT, ask_servers(&servers, question, transport)).await {
            Ok(Some(bytes)) => {
                self.cache.borrow_mut().put(question, &bytes, Instant::now());
                Some(fit(bytes, question.limit))
            }
            _ => failure(question, ResponseCode::ServFail),
        }
    }
}

/// `nameserver` lines of a resolv.conf(5).
#[must_use]
pub fn nameservers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|w| *w == "nameserver").and(words.next())?;
            address.parse().ok()
        })
        .take(MAX_SERVERS)
        .collect()
}

async fn ask_servers(servers: &[IpAddr], question: &Question, transport: Transport) -> Option<Vec<u8>> {
    let mut last = None;
    for server in std::iter::repeat_n(servers.iter().take(MAX_SERVERS), ROUNDS).flatten() {
        let server = SocketAddr::new(*server, 53);
        let (id, query) = outgoing(question)?;
        let tried = match transport {
            Transport::Udp => timeout(TRY_TIMEOUT, over_udp(server, id, &query)).await,
            Transport::Tcp => timeout(TRY_TIMEOUT, over_tcp(server, id, &query)).await,
        };
        let mut bytes = match tried {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => {
                tracing::debug!(%server, %error, "a DNS server cannot be asked");
                continue;
            }
            Err(_) => continue,
        };
        bytes[..2].copy_from_slice(&question.id.to_be_bytes());
        // Servers spell the name as we asked, but need not: give the client back its own spelling.
        let end = question_end(&query)?;
        bytes[HEADER_BYTES..end].copy_from_slice(&query[HEADER_BYTES..end]);
        // Server failure or refusal (RFC 1035 section 4.1.1): another server may know more.
        if matches!(bytes[3] & 0x0f, 2 | 5) {
            last = Some(bytes);
            continue;
        }
        return Some(bytes);
    }
    last
}

/// A fresh query with an id nobody can guess. The source port is random too: the kernel picks one per socket.
fn outgoing(question: &Question) -> Option<(u16, Vec<u8>)> {
    let mut random = [0; 2];
    SystemRandom.fill(&mut random);
    let id = u16::from_be_bytes(random);
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.add_query(question.query.clone());
    if let Some(dnssec_ok) = question.edns {
        // Options of the client (its subnet, cookies) stay with us.
        let mut edns = Edns::new();
        edns.set_max_payload(EDNS_PAYLOAD).set_version(0).set_dnssec_ok(dnssec_ok);
        message.set_edns(edns);
    }
    Some((id, message.to_vec().ok()?))
}

async fn over_udp(server: SocketAddr, id: u16, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel drops what comes from anybody else.
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if is_answer(&buffer[..len], id, query) {
            buffer.truncate(len);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(server: SocketAddr, id: u16, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = Vec::with_capacity(query.len() + 2);
    framed.extend(u16::try_from(query.len()).map_err(io::Error::other)?.to_be_bytes());
    framed.extend(query);
    stream.write_all(&framed).await?;
    let mut bytes = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut bytes).await?;
    if is_answer(&bytes, id, query) { Ok(bytes) } else { Err(io::Error::other("the answer is for another question")) }
}

/// Whether `bytes` answers exactly `query`: same id, a response, the same single question.
fn is_answer(bytes: &[u8], id: u16, query: &[u8]) -> bool {
    let Some(end) = question_end(query) else { return false };
    bytes.len() >= end
        && bytes[..2] == id.to_be_bytes()
        && bytes[2] & 0x80 != 0
        && bytes[4..6] == [0, 1]
        && bytes[HEADER_BYTES..end].eq_ignore_ascii_case(&query[HEADER_BYTES..end])
}

/// Where the only question of a message of ours (uncompressed) ends.
fn question_end(query: &[u8]) -> Option<usize> {
    let mut at = HEADER_BYTES;
    loop {
        let len = usize::from(*query.get(at)?);
        at += 1 + len;
        if len == 0 {
            break;
        }
    }
    (at + 4 <= query.len()).then_some(at + 4)
}

/// Cuts an answer that the client cannot take down to header and question, with TC set (RFC 2181 section 9).
fn fit(mut bytes: Vec<u8>, limit: usize) -> Vec<u8> {
    if bytes.len() > limit
        && let Some(end) = question_end(&bytes)
    {
        bytes.truncate(end);
        bytes[2] |= 0x02;
        bytes[6..HEADER_BYTES].fill(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    fn question() -> Question {
        let query = Query::query(Name::from_ascii("Example.org.").unwrap(), RecordType::A);
        Question { id: 7, query, edns: Some(true), checking_disabled: false, limit: 512 }
    }

    #[test]
    fn reads_resolv_conf() {
        let text =
            "# x\nnameserver 192.0.2.1\nsearch a b\nnameserver fe80::1%eth0\n nameserver 2001:db8::1 \nnameserver\n";
        let expected: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(nameservers(text), expected);
    }

    #[test]
    fn believes_only_the_answer_to_its_question() {
        let (id, query) = outgoing(&question()).unwrap();
        let mut answer = query.clone();
        assert!(!is_answer(&answer, id, &query), "a query is no answer");
        answer[2] |= 0x80;
        assert!(is_answer(&answer, id, &query));
        assert!(!is_answer(&answer, id ^ 1, &query));
        answer[HEADER_BYTES + 1] ^= 0x20;
        assert!(is_answer(&answer, id, &query), "case does not matter");
        answer[HEADER_BYTES + 1] = b'z';
        assert!(!is_answer(&answer, id, &query));
    }

    #[test]
    fn long_answers_are_cut() {
        let (_, mut bytes) = outgoing(&question()).unwrap();
        bytes.resize(900, 1);
        let cut = fit(bytes, 512);
        let message = Message::from_vec(&cut).unwrap();
        assert!(message.metadata.truncation);
        assert_eq!(message.queries.len(), 1);
    }

    proptest! {
        #[test]
        fn random_answers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), limit in 0usize..600) {
            let (id, query) = outgoing(&question()).unwrap();
            let _ = is_answer(&bytes, id, &query);
            let _ = fit(bytes, limit);
        }
    }
}
