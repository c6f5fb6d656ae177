use dhcproto::{Decodable, Decoder};
use proptest::prelude::*;

use super::*;
use crate::view::testing;

fn request(mac: Mac, kind: MessageType, edit: impl FnOnce(&mut Message)) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(0x1234_5678, none, none, none, none, &mac);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    edit(&mut message);
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn decode(reply: &Reply) -> Message {
    Message::decode(&mut Decoder::new(&reply.bytes)).unwrap()
}

const WEB: Mac = [2, 0, 0, 0, 0, 10];

fn addr(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[test]
fn offers_everything_a_guest_needs() {
    let reply = answer(&testing::view(), &request(WEB, MessageType::Discover, |_| {})).unwrap();
    assert_eq!(reply.to, "255.255.255.255:68".parse().unwrap());
    assert_eq!(reply.from, addr("10.1.2.1"));
    assert!(reply.bytes.len() >= MIN_ANSWER_BYTES);
    let message = decode(&reply);
    assert_eq!(message.xid(), 0x1234_5678);
    assert_eq!(message.yiaddr(), addr("10.1.2.10"));
    let has = |option: DhcpOption| {
        let code = OptionCode::from(&option);
        assert_eq!(message.opts().get(code), Some(&option));
    };
    has(DhcpOption::MessageType(MessageType::Offer));
    has(DhcpOption::ServerIdentifier(addr("10.1.2.1")));
    has(DhcpOption::SubnetMask(addr("255.255.255.0")));
    has(DhcpOption::Router(vec![addr("10.1.2.1")]));
    has(DhcpOption::DomainNameServer(vec![addr("10.1.2.1")]));
    has(DhcpOption::DomainName("blue.p1.oblak.internal".into()));
    has(DhcpOption::InterfaceMtu(1450));
    has(DhcpOption::Hostname("web".into()));
    has(DhcpOption::AddressLeaseTime(3600));
    has(DhcpOption::Renewal(1800));
    has(DhcpOption::Rebinding(3150));
    has(DhcpOption::ClasslessStaticRoute(vec![
        ("169.254.169.254/32".parse().unwrap(), addr("10.1.2.1")),
        ("0.0.0.0/0".parse().unwrap(), addr("10.1.2.1")),
    ]));
}

#[test]
fn unknown_and_remote_guests_get_nothing() {
    let view = testing::view();
    for mac in [[2, 0, 0, 0, 0, 99], [2, 0, 0, 0, 0, 12]] {
        assert_eq!(answer(&view, &request(mac, MessageType::Discover, |_| {})), None);
    }
}

#[test]
fn the_states_of_rfc_2131() {
    let view = testing::view();
    let ask = |edit: &dyn Fn(&mut Message)| {
        answer(&view, &request(WEB, MessageType::Request, edit))
            .map(|r| (decode(&r).opts().msg_type().unwrap(), *r.to.ip()))
    };
    let broadcast = Ipv4Addr::BROADCAST;
    let selecting = |server: &str, wanted: &str| {
        let (server, wanted) = (addr(server), addr(wanted));
        ask(&move |m| {
            m.opts_mut().insert(DhcpOption::ServerIdentifier(server));
            m.opts_mut().insert(DhcpOption::RequestedIpAddress(wanted));
        })
    };
    assert_eq!(selecting("10.1.2.1", "10.1.2.10"), Some((MessageType::Ack, broadcast)));
    assert_eq!(selecting("10.1.2.1", "10.1.2.11"), Some((MessageType::Nak, broadcast)));
    assert_eq!(selecting("10.9.9.9", "10.1.2.10"), None, "it chose another server");
    let rebooting = |wanted: &str| {
        let wanted = addr(wanted);
        ask(&move |m| {
            m.opts_mut().insert(DhcpOption::RequestedIpAddress(wanted));
        })
    };
    assert_eq!(rebooting("10.1.2.10"), Some((MessageType::Ack, broadcast)));
    assert_eq!(rebooting("192.168.0.7"), Some((MessageType::Nak, broadcast)));
    let renewing = |has: &str| {
        let has = addr(has);
        ask(&move |m| {
            m.set_ciaddr(has);
        })
    };
    assert_eq!(renewing("10.1.2.10"), Some((MessageType::Ack, addr("10.1.2.10"))));
    assert_eq!(renewing("10.1.2.13"), Some((MessageType::Nak, broadcast)));
    assert_eq!(ask(&|_| {}), None);
}

#[test]
fn a_nak_carries_no_address_and_an_inform_no_lease() {
    let view = testing::view();
    let nak = answer(
        &view,
        &request(WEB, MessageType::Request, |m| {
            m.set_ciaddr(addr("10.1.2.13"));
        }),
    );
    let nak = decode(&nak.unwrap());
    assert!(nak.yiaddr().is_unspecified() && nak.ciaddr().is_unspecified());
    assert!(!nak.opts().contains(OptionCode::SubnetMask));
    let inform = |has: &str| {
        let has = addr(has);
        answer(
            &view,
            &request(WEB, MessageType::Inform, |m| {
                m.set_ciaddr(has);
            }),
        )
    };
    let ack = decode(&inform("10.1.2.10").unwrap());
    assert!(ack.yiaddr().is_unspecified());
    assert!(ack.opts().contains(OptionCode::DomainNameServer));
    assert!(!ack.opts().contains(OptionCode::AddressLeaseTime));
    assert_eq!(inform("10.1.2.11"), None);
}

#[test]
fn releases_relays_and_answers_are_silent() {
    let view = testing::view();
    for kind in [MessageType::Release, MessageType::Decline, MessageType::Offer] {
        assert_eq!(answer(&view, &request(WEB, kind, |_| {})), None);
    }
    let relayed = request(WEB, MessageType::Discover, |m| {
        m.set_giaddr(addr("10.1.2.200"));
    });
    assert_eq!(answer(&view, &relayed), None);
}

#[test]
fn only_the_first_interface_gets_routes() {
    let mut plan = testing::plan();
    plan.ports[0].index = 1;
    let view = View::new(plan).unwrap();
    let message = decode(&answer(&view, &request(WEB, MessageType::Discover, |_| {})).unwrap());
    assert!(!message.opts().contains(OptionCode::Router));
    assert!(!message.opts().contains(OptionCode::ClasslessStaticRoute));
}

#[test]
fn the_longest_names_fit_into_the_smallest_datagram() {
    let mut plan = testing::plan();
    plan.name = "n".repeat(63);
    plan.project = "p".repeat(63);
    plan.ports[0].hostname = "h".repeat(63);
    let view = View::new(plan).unwrap();
    let reply = answer(
        &view,
        &request(WEB, MessageType::Discover, |m| {
            m.opts_mut().insert(DhcpOption::ClientIdentifier(vec![7; 80]));
        }),
    );
    let reply = reply.unwrap();
    assert!(reply.bytes.len() <= SAFE_ANSWER_BYTES, "{}", reply.bytes.len());
    let message = decode(&reply);
    assert!(message.opts().contains(OptionCode::Router));
    assert!(!message.opts().contains(OptionCode::DomainSearch));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = answer(&testing::view(), &bytes);
    }

    #[test]
    fn random_options_never_panic_and_never_give_away_another_address(
        tail in proptest::collection::vec(any::<u8>(), 0..300),
        kind in 0u8..20,
        mac_end in any::<u8>(),
        ciaddr in any::<u32>(),
    ) {
        let view = testing::view();
        let mac = [2, 0, 0, 0, 0, mac_end];
        let mut bytes = request(mac, MessageType::Discover, |m| { m.set_ciaddr(Ipv4Addr::from(ciaddr)); });
        bytes.truncate(HEADER_BYTES);
        bytes.extend([53, 1, kind]);
        bytes.extend(tail);
        if let Some(reply) = answer(&view, &bytes) {
            let message = decode(&reply);
            prop_assert!(mac_end == 10 || mac_end == 11);
            let own = Ipv4Addr::new(10, 1, 2, mac_end);
            prop_assert!(message.yiaddr() == own || message.yiaddr().is_unspecified());
            prop_assert_eq!(message.chaddr(), mac);
        }
    }
}
