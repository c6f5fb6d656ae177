//! A small cache of answers from outside, one per network, so that no tenant learns what another one asks for.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};

use super::Question;

/// Most answers kept.
const MAX_ENTRIES: usize = 256;
/// Longest answer kept, bytes.
const MAX_ANSWER_BYTES: usize = 2048;
/// Most bytes of answers kept.
const MAX_BYTES: usize = 128 << 10;
/// Longest time an answer is kept, whatever its owner allows.
const MAX_TTL_S: u32 = 300;

/// Name in lower case, type, DNSSEC wanted, checking disabled.
type Key = (String, RecordType, Option<bool>, bool);

#[derive(Debug)]
struct Entry {
    bytes: Vec<u8>,
    stored: Instant,
    expires: Instant,
}

/// Answers by question.
#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Key, Entry>,
    /// Keys in the order they came, to drop the oldest.
    order: VecDeque<Key>,
    bytes: usize,
}

fn key(question: &Question) -> Key {
    let query = &question.query;
    (query.name.to_lowercase().to_ascii(), query.query_type, question.edns, question.checking_disabled)
}

impl Cache {
    /// The answer as it would come now, for the client's id, with its spelling of the name and what is left of the TTLs.
    pub fn get(&self, question: &Question, now: Instant) -> Option<Vec<u8>> {
        let entry = self.entries.get(&key(question)).filter(|e| e.expires > now)?;
        let mut message = Message::from_vec(&entry.bytes).ok()?;
        let age = u32::try_from(now.saturating_duration_since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        message.metadata.id = question.id;
        message.queries = vec![question.query.clone()];
        for record in message.answers.iter_mut().chain(&mut message.authorities).chain(&mut message.additionals) {
            record.decrement_ttl(age);
        }
        message.to_vec().ok()
    }

    /// Keeps an answer if it may be kept.
    pub fn put(&mut self, question: &Question, bytes: &[u8], now: Instant) {
        if bytes.len() > MAX_ANSWER_BYTES {
            return;
        }
        let Some(ttl) = Message::from_vec(bytes).ok().as_ref().and_then(lifetime) else { return };
        let key = key(question);
        if let Some(old) = self.entries.remove(&key) {
            self.bytes -= old.bytes.len();
            self.order.retain(|k| *k != key);
        }
        while self.entries.len() >= MAX_ENTRIES || self.bytes + bytes.len() > MAX_BYTES {
            let Some(oldest) = self.order.pop_front() else { return };
            self.bytes -= self.entries.remove(&oldest).map_or(0, |e| e.bytes.len());
        }
        self.bytes += bytes.len();
        self.order.push_back(key.clone());
        let expires = now + Duration::from_secs(ttl.into());
        self.entries.insert(key, Entry { bytes: bytes.to_vec(), stored: now, expires });
    }
}

/// Seconds an answer may be kept; `None` when it may not (RFC 2308 for the negative ones).
fn lifetime(message: &Message) -> Option<u32> {
    let is_final = matches!(message.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
    if !is_final || message.metadata.truncation {
        return None;
    }
    let shortest = message.answers.iter().chain(&message.authorities).map(|r| r.ttl).min()?;
    let negative = message.answers.is_empty() || message.metadata.response_code == ResponseCode::NXDomain;
    let ttl = if negative {
        message.authorities.iter().find_map(|r| match &r.data {
            RData::SOA(soa) => Some(soa.minimum.min(r.ttl)),
            _ => None,
        })?
    } else {
        shortest
    };
    (ttl > 0).then(|| ttl.min(MAX_TTL_S))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, Record};

    fn question(name: &str) -> Question {
        let query = Query::query(Name::from_ascii(name).unwrap(), RecordType::A);
        Question { id: 7, query, edns: None, checking_disabled: false, limit: 512 }
    }

    fn reply(name: &str, ttl: u32) -> Vec<u8> {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        let name = Name::from_ascii(name).unwrap();
        message.add_query(Query::query(name.clone(), RecordType::A));
        message.add_answer(Record::from_rdata(name, ttl, RData::A(A::new(192, 0, 2, 1))));
        message.to_vec().unwrap()
    }

    #[test]
    fn keeps_for_the_ttl_and_answers_in_the_spelling_of_the_client() {
        let mut cache = Cache::default();
        let start = Instant::now();
        cache.put(&question("example.org."), &reply("example.org.", 60), start);
        let hit = cache.get(&question("eXample.ORG."), start + Duration::from_secs(20)).unwrap();
        let hit = Message::from_vec(&hit).unwrap();
        assert_eq!(hit.metadata.id, 7);
        assert_eq!(hit.queries[0].name.to_ascii(), "eXample.ORG.");
        assert_eq!(hit.answers[0].ttl, 40);
        assert!(cache.get(&question("example.org."), start + Duration::from_secs(61)).is_none());
        cache.put(&question("zero.org."), &reply("zero.org.", 0), start);
        assert!(cache.get(&question("zero.org."), start).is_none());
    }

    #[test]
    fn is_bounded() {
        let mut cache = Cache::default();
        let start = Instant::now();
        for n in 0..10_000 {
            let name = format!("host{n}.example.org.");
            cache.put(&question(&name), &reply(&name, 60), start);
        }
        assert!(cache.entries.len() <= MAX_ENTRIES && cache.order.len() == cache.entries.len());
        assert_eq!(cache.bytes, cache.entries.values().map(|e| e.bytes.len()).sum::<usize>());
        assert!(cache.get(&question("host9999.example.org."), start).is_some());
    }
}
