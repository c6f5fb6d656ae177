//! DNS for the guests of a network: names and addresses of its ports are answered here, the rest is asked outside.
//!
//! This module is pure: a question and a [`View`] in, an [`Outcome`] out. [`forward`] asks outside.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::IpNet;

use crate::view::{ROOT_ZONE, View};

pub mod cache;
pub mod forward;

/// Seconds guests may remember what we say: short, because ports come and go.
const TTL_S: u32 = 10;
/// Seconds guests may remember that a name does not exist.
const NEGATIVE_TTL_S: u32 = 5;
/// UDP payload we take and give: fits every path without fragments (DNS flag day 2020).
pub const EDNS_PAYLOAD: u16 = 1232;
/// UDP payload of clients that do not speak EDNS (RFC 1035 section 4.2.1).
pub const PLAIN_PAYLOAD: u16 = 512;
/// Bytes of a DNS header.
pub const HEADER_BYTES: usize = 12;

/// What to do with a question.
#[derive(Debug)]
pub enum Outcome {
    /// Send this.
    Answer(Vec<u8>),
    /// Ask outside.
    Forward(Box<Question>),
    /// Say nothing: it was no question.
    Drop,
}

/// A question that others have to answer.
#[derive(Debug, Clone)]
pub struct Question {
    /// The client's id.
    pub id: u16,
    /// What it asks, in its own spelling.
    pub query: Query,
    /// Whether it speaks EDNS, and then whether it wants DNSSEC records.
    pub edns: Option<bool>,
    /// Whether it wants to check DNSSEC itself.
    pub checking_disabled: bool,
    /// Longest answer it takes.
    pub limit: usize,
}

/// How a question came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// UDP, with short answers.
    Udp,
    /// TCP.
    Tcp,
}

/// Decides about one message from a guest.
#[must_use]
pub fn answer(view: &View, bytes: &[u8], transport: Transport) -> Outcome {
    // A response (QR set) is never answered: two servers could be made to talk to each other for ever.
    if bytes.len() < HEADER_BYTES || bytes[2] & 0x80 != 0 {
        return Outcome::Drop;
    }
    let Ok(request) = Message::from_vec(bytes) else {
        let id = u16::from_be_bytes([bytes[0], bytes[1]]);
        let error = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
        return error.to_vec().map_or(Outcome::Drop, Outcome::Answer);
    };
    let limit = match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => {
            let wanted = request.edns.as_ref().map_or(PLAIN_PAYLOAD, Edns::max_payload);
            usize::from(wanted.clamp(PLAIN_PAYLOAD, EDNS_PAYLOAD))
        }
    };
    let reply = match decide(view, &request) {
        Decision::Forward => {
            return Outcome::Forward(Box::new(Question {
                id: request.metadata.id,
                query: request.queries[0].clone(),
                edns: request.edns.as_ref().map(|e| e.flags().dnssec_ok),
                checking_disabled: request.metadata.checking_disabled,
                limit,
            }));
        }
        Decision::Refuse(code) => Local { code, ..Local::default() },
        Decision::Local(local) => local,
    };
    respond(&request, reply, limit).map_or(Outcome::Drop, Outcome::Answer)
}

/// "Something went wrong outside" for a question.
#[must_use]
pub fn failure(question: &Question, code: ResponseCode) -> Option<Vec<u8>> {
    let mut message = Message::error_msg(question.id, OpCode::Query, code);
    message.metadata.recursion_desired = true;
    message.metadata.recursion_available = true;
    message.add_query(question.query.clone());
    if question.edns.is_some() {
        message.set_edns(our_edns());
    }
    message.to_vec().ok()
}

enum Decision {
    Forward,
    Refuse(ResponseCode),
    Local(Local),
}

#[derive(Default)]
struct Local {
    code: ResponseCode,
    authoritative: bool,
    answers: Vec<RData>,
    /// Zone whose SOA proves that there is nothing.
    soa: Option<Name>,
}

fn decide(view: &View, request: &Message) -> Decision {
    if request.metadata.op_code != OpCode::Query {
        return Decision::Refuse(ResponseCode::NotImp);
    }
    let [query] = &request.queries[..] else { return Decision::Refuse(ResponseCode::FormErr) };
    if request.edns.as_ref().is_some_and(|e| e.version() > 0) {
        return Decision::Refuse(ResponseCode::BADVERS);
    }
    if query.query_class != DNSClass::IN {
        return Decision::Refuse(ResponseCode::Refused);
    }
    // Zone transfers and the like are nobody's business.
    if matches!(query.query_type, RecordType::AXFR | RecordType::IXFR) {
        return Decision::Refuse(ResponseCode::Refused);
    }
    match lookup(view, &query.name, query.query_type) {
        Some(local) => Decision::Local(local),
        None => Decision::Forward,
    }
}

/// What we know about a name; `None` when others have to be asked.
fn lookup(view: &View, name: &Name, kind: RecordType) -> Option<Local> {
    let (Ok(domain), Ok(root)) =
        (Name::from_ascii(format!("{}.", view.domain)), Name::from_ascii(format!("{ROOT_ZONE}.")))
    else {
        // View::new admits only valid labels; refuse rather than ask outside.
        return Some(Local { code: ResponseCode::ServFail, ..Local::default() });
    };
    if domain.zone_of(name) {
        return Some(match name.num_labels() - domain.num_labels() {
            0 => apex(view, domain, kind),
            1 => host(view, name, kind).unwrap_or_else(|| missing(domain)),
            _ => missing(domain),
        });
    }
    if root.zone_of(name) {
        // Names between the root and our domain exist, they only have no records (RFC 8020); other networks do not for us.
        return Some(if name.zone_of(&domain) { empty(root) } else { missing(root) });
    }
    if let Some(local) = reverse(view, name, kind) {
        return Some(local);
    }
    if name.is_localhost() {
        return Some(loopback(kind));
    }
    if name.num_labels() == 1 {
        let found = host(view, name, kind);
        // A bare name is meant for us. Only records that top-level domains have are worth asking for outside.
        let is_address = matches!(kind, RecordType::A | RecordType::AAAA | RecordType::ANY);
        return found.or_else(|| is_address.then(|| missing(Name::root())));
    }
    None
}

fn host(view: &View, name: &Name, kind: RecordType) -> Option<Local> {
    let label = std::str::from_utf8(name.iter().next()?).ok()?.to_ascii_lowercase();
    let mut known = false;
    let mut answers = Vec::new();
    for address in view.by_name(&label).inspect(|_| known = true).flat_map(|port| &port.addresses) {
        match (address, kind) {
            (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => answers.push(RData::A(A(*v4))),
            (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => answers.push(RData::AAAA(AAAA(*v6))),
            _ => {}
        }
    }
    known.then(|| found(answers, Name::from_ascii(format!("{}.", view.domain)).unwrap_or_default()))
}

fn apex(view: &View, domain: Name, kind: RecordType) -> Local {
    match kind {
        RecordType::SOA | RecordType::ANY => found(vec![soa(&domain)], domain),
        RecordType::NS => found(vec![RData::NS(hickory_proto::rr::rdata::NS(server(&domain)))], domain),
        // The address of the domain's own name server, so that delegation checks of clients end somewhere.
        RecordType::A => {
            let v4 = view.gateways().filter_map(|g| if let IpAddr::V4(a) = g { Some(RData::A(A(a))) } else { None });
            found(v4.collect(), domain)
        }
        _ => empty(domain),
    }
}

/// PTR questions about addresses of our subnets.
fn reverse(view: &View, name: &Name, kind: RecordType) -> Option<Local> {
    let labels: Vec<_> = name.iter().collect();
    if !labels.last()?.eq_ignore_ascii_case(b"arpa") {
        return None;
    }
    let address = name.to_lowercase().parse_arpa_name().ok()?;
    if address.prefix_len() != address.max_prefix_len() {
        return None;
    }
    let subnet = view.subnet_of(address.addr())?;
    let zone = reverse_zone(name, &subnet.cidr);
    let Some(port) = view.by_address(address.addr()).filter(|p| !p.hostname.is_empty()) else {
        return Some(missing(zone));
    };
    if !matches!(kind, RecordType::PTR | RecordType::ANY) {
        return Some(empty(zone));
    }
    let target = Name::from_ascii(format!("{}.", view.fqdn(port))).ok()?;
    Some(found(vec![RData::PTR(PTR(target))], zone))
}

/// The reverse zone that holds a subnet: cut at the octet (IPv4) or digit (IPv6) at or above its prefix.
fn reverse_zone(name: &Name, cidr: &IpNet) -> Name {
    let kept = match cidr {
        IpNet::V4(net) => net.prefix_len() / 8,
        IpNet::V6(net) => net.prefix_len() / 4,
    };
    name.trim_to(usize::from(kept) + 2)
}

/// RFC 6761 section 6.3.
fn loopback(kind: RecordType) -> Local {
    let answers = match kind {
        RecordType::A => vec![RData::A(A(std::net::Ipv4Addr::LOCALHOST))],
        RecordType::AAAA => vec![RData::AAAA(AAAA(std::net::Ipv6Addr::LOCALHOST))],
        _ => vec![],
    };
    found(answers, Name::from_ascii("localhost.").unwrap_or_default())
}

fn found(answers: Vec<RData>, zone: Name) -> Local {
    let soa = answers.is_empty().then_some(zone);
    Local { code: ResponseCode::NoError, authoritative: true, answers, soa }
}

fn empty(zone: Name) -> Local {
    found(vec![], zone)
}

fn missing(zone: Name) -> Local {
    Local { code: ResponseCode::NXDomain, ..empty(zone) }
}

fn server(zone: &Name) -> Name {
    zone.clone()
}

fn soa(zone: &Name) -> RData {
    let contact = zone.prepend_label("hostmaster").unwrap_or_else(|_| zone.clone());
    let day = 86_400;
    RData::SOA(SOA::new(server(zone), contact, 1, day, day, day, NEGATIVE_TTL_S))
}

fn our_edns() -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(EDNS_PAYLOAD).set_version(0);
    edns
}

fn respond(request: &Message, local: Local, limit: usize) -> Option<Vec<u8>> {
    let mut message = Message::response(request.metadata.id, request.metadata.op_code);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = request.metadata.checking_disabled;
    message.metadata.authoritative = local.authoritative;
    message.metadata.response_code = local.code;
    message.add_queries(request.queries.iter().take(1).cloned());
    if let Some(query) = request.queries.first() {
        for data in local.answers {
            message.add_answer(Record::from_rdata(query.name.clone(), TTL_S, data));
        }
    }
    if let Some(zone) = local.soa {
        let data = soa(&zone);
        message.add_authority(Record::from_rdata(zone, NEGATIVE_TTL_S, data));
    }
    if let Some(theirs) = &request.edns {
        let mut edns = our_edns();
        edns.set_dnssec_ok(theirs.flags().dnssec_ok);
        if local.code == ResponseCode::BADVERS {
            edns.set_rcode_high(local.code.high());
        }
        message.set_edns(edns);
    }
    let bytes = message.to_vec().ok()?;
    if bytes.len() <= limit { Some(bytes) } else { message.truncate().to_vec().ok() }
}

#[cfg(test)]
mod tests;
