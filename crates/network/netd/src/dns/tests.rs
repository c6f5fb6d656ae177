use proptest::prelude::*;

use hickory_proto::op::MessageType;

use super::*;
use crate::view::testing;

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0xbeef;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask_view(view: &View, name: &str, kind: RecordType) -> Option<Message> {
    match answer(view, &query(name, kind).to_vec().unwrap(), Transport::Udp) {
        Outcome::Answer(bytes) => Some(Message::from_vec(&bytes).unwrap()),
        Outcome::Forward(_) => None,
        Outcome::Drop => panic!("dropped {name}"),
    }
}

fn ask(name: &str, kind: RecordType) -> Option<Message> {
    ask_view(&testing::view(), name, kind)
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

#[test]
fn names_of_all_ports_resolve_in_any_case() {
    for name in ["web.", "WeB.", "web.blue.p1.oblak.internal.", "wEb.Blue.P1.Oblak.INTERNAL."] {
        let reply = ask(name, RecordType::A).unwrap();
        assert_eq!(data(&reply), ["10.1.2.10"], "{name}");
        assert_eq!(reply.metadata.id, 0xbeef);
        assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
        assert_eq!(reply.queries[0].name.to_ascii(), name, "the spelling comes back");
        assert_eq!(reply.answers[0].name.to_ascii(), name);
    }
    assert_eq!(data(&ask("far.", RecordType::A).unwrap()), ["10.1.2.12"], "also of other nodes");
}

#[test]
fn nothing_and_no_such_name_differ() {
    let nodata = ask("web.", RecordType::AAAA).unwrap();
    assert_eq!(nodata.metadata.response_code, ResponseCode::NoError);
    assert!(nodata.answers.is_empty());
    assert_eq!(nodata.authorities[0].name.to_ascii(), "blue.p1.oblak.internal.");
    assert_eq!(nodata.authorities[0].record_type(), RecordType::SOA);
    for (name, zone) in [
        ("nope.blue.p1.oblak.internal.", "blue.p1.oblak.internal."),
        ("a.web.blue.p1.oblak.internal.", "blue.p1.oblak.internal."),
        ("web.red.p1.oblak.internal.", "oblak.internal."),
        ("x.p2.oblak.internal.", "oblak.internal."),
        ("nope.", "."),
    ] {
        let reply = ask(name, RecordType::A).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
        assert_eq!(reply.authorities[0].name.to_ascii(), zone, "{name}");
    }
    for name in ["oblak.internal.", "p1.oblak.internal."] {
        let reply = ask(name, RecordType::A).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "{name}");
        assert!(reply.answers.is_empty());
    }
    let apex = ask("blue.p1.oblak.internal.", RecordType::SOA).unwrap();
    assert_eq!(apex.answers[0].record_type(), RecordType::SOA);
}

#[test]
fn addresses_have_names() {
    let reply = ask("10.2.1.10.in-addr.arpa.", RecordType::PTR).unwrap();
    assert_eq!(data(&reply), ["web.blue.p1.oblak.internal."]);
    let unknown = ask("77.2.1.10.in-addr.arpa.", RecordType::PTR).unwrap();
    assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(unknown.authorities[0].name.to_ascii(), "2.1.10.in-addr.arpa.");
    assert!(ask("1.0.0.127.in-addr.arpa.", RecordType::PTR).is_none());
    let mut plan = testing::plan();
    plan.subnets.push(oblak_network::SubnetPlan {
        cidr: "fd00:1::/64".parse().unwrap(),
        gateway: "fd00:1::1".parse().unwrap(),
        lease_s: 60,
    });
    plan.ports[0].addresses.push("fd00:1::a".parse().unwrap());
    let view = View::new(plan).unwrap();
    assert_eq!(data(&ask_view(&view, "web.", RecordType::AAAA).unwrap()), ["fd00:1::a"]);
    let name = "a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa.";
    assert_eq!(data(&ask_view(&view, name, RecordType::PTR).unwrap()), ["web.blue.p1.oblak.internal."]);
}

#[test]
fn only_foreign_names_go_outside() {
    for (name, kind) in [("example.org.", RecordType::A), ("org.", RecordType::NS), (".", RecordType::NS)] {
        assert!(ask(name, kind).is_none(), "{name}");
    }
    for kind in [RecordType::A, RecordType::TXT, RecordType::NS, RecordType::DS, RecordType::ANY] {
        for name in ["oblak.internal.", "x.oblak.internal.", "X.Y.OBLAK.Internal.", "blue.p1.oblak.internal."] {
            assert!(ask(name, kind).is_some(), "{name}");
        }
    }
    assert_eq!(data(&ask("localhost.", RecordType::A).unwrap()), ["127.0.0.1"]);
}

#[test]
fn odd_requests_get_the_right_code() {
    let view = testing::view();
    let code = |message: &Message| match answer(&view, &message.to_vec().unwrap(), Transport::Udp) {
        Outcome::Answer(bytes) => Message::from_vec(&bytes).unwrap().metadata.response_code,
        other => panic!("{other:?}"),
    };
    let mut update = query("web.", RecordType::A);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(code(&update), ResponseCode::NotImp);
    let mut chaos = query("version.bind.", RecordType::TXT);
    chaos.queries[0].query_class = DNSClass::CH;
    assert_eq!(code(&chaos), ResponseCode::Refused);
    assert_eq!(code(&query("blue.p1.oblak.internal.", RecordType::AXFR)), ResponseCode::Refused);
    let mut new = query("web.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    new.set_edns(edns);
    assert_eq!(u16::from(code(&new)), u16::from(ResponseCode::BADVERS));
    let mut response = query("web.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(matches!(answer(&view, &response.to_vec().unwrap(), Transport::Udp), Outcome::Drop));
}

#[test]
fn long_answers_are_truncated_on_udp_only() {
    let mut plan = testing::plan();
    plan.ports = (10..=200).map(|n| testing::port(n, "many", oblak_network::PortKind::Tap)).collect();
    let view = View::new(plan).unwrap();
    let request = query("many.", RecordType::A).to_vec().unwrap();
    let reply = |transport| match answer(&view, &request, transport) {
        Outcome::Answer(bytes) => (bytes.len(), Message::from_vec(&bytes).unwrap()),
        other => panic!("{other:?}"),
    };
    let (len, udp) = reply(Transport::Udp);
    assert!(len <= 512 && udp.metadata.truncation && udp.answers.is_empty());
    let (_, tcp) = reply(Transport::Tcp);
    assert!(!tcp.metadata.truncation);
    assert_eq!(tcp.answers.len(), 191);
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = answer(&testing::view(), &bytes, Transport::Udp);
    }

    #[test]
    fn broken_queries_never_panic(at in 0usize..60, value in any::<u8>(), cut in 0usize..60) {
        let mut bytes = query("web.blue.p1.oblak.internal.", RecordType::A).to_vec().unwrap();
        if let Some(byte) = bytes.get_mut(at) { *byte = value; }
        bytes.truncate(cut.max(12));
        let _ = answer(&testing::view(), &bytes, Transport::Udp);
    }

    #[test]
    fn no_spelling_of_our_zone_leaves(label in "[a-zA-Z0-9_]{1,20}", flips in any::<u64>()) {
        let name: String = format!("{label}.oblak.internal.").chars().enumerate()
            .map(|(i, c)| if flips >> (i % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c }).collect();
        let message = query(&name, RecordType::A).to_vec().unwrap();
        prop_assert!(matches!(answer(&testing::view(), &message, Transport::Udp), Outcome::Answer(_)));
    }
}
