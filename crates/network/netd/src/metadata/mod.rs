//! The metadata service at 169.254.169.254, in the layouts of OpenStack and EC2.
//!
//! Who asks is known by the address the request comes from, inside the network it comes from; the firewall lets no port use
//! another one's address. There is nothing to ask about anybody else.
//!
//! This module is pure: a request in, a [`Reply`] out.

use std::net::IpAddr;

use http::{HeaderMap, Method, StatusCode};
use oblak_model::Timestamp;
use oblak_network::{InstanceMetadata, PortKind, PortPlan};

use crate::view::{View, World};

pub mod ec2;
pub mod openstack;
pub mod token;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Status code.
    pub status: StatusCode,
    /// Media type.
    pub content_type: &'static str,
    /// Body.
    pub body: Vec<u8>,
    /// Seconds a token lives, for the header of the same meaning.
    pub token_ttl_s: Option<u32>,
}

impl Reply {
    fn text(body: impl Into<Vec<u8>>) -> Self {
        Self { status: StatusCode::OK, content_type: "text/plain; charset=utf-8", body: body.into(), token_ttl_s: None }
    }
    fn json(value: &serde_json::Value) -> Self {
        Self { content_type: "application/json", ..Self::text(value.to_string()) }
    }
    fn error(status: StatusCode) -> Self {
        let reason = status.canonical_reason().unwrap_or("error");
        Self { status, ..Self::text(format!("{reason}\n")) }
    }
}

/// Who asks.
pub struct Asker<'a> {
    /// All networks; an instance may have ports in several.
    pub world: &'a World,
    /// The network the request came from.
    pub view: &'a View,
    /// Its port.
    pub port: &'a PortPlan,
    /// Its metadata.
    pub metadata: &'a InstanceMetadata,
}

impl<'a> Asker<'a> {
    /// The port behind `peer`; `None` when it is not one of this node with metadata.
    #[must_use]
    pub fn find(world: &'a World, view: &'a View, peer: IpAddr) -> Option<Self> {
        let port = view.by_address(peer).filter(|p| p.kind != PortKind::Remote)?;
        Some(Self { world, view, port, metadata: port.metadata.as_ref()? })
    }

    /// Its full name.
    #[must_use]
    pub fn fqdn(&self) -> String {
        self.view.fqdn(self.port)
    }

    /// Its first IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Option<IpAddr> {
        self.port.addresses.iter().copied().find(IpAddr::is_ipv4)
    }
}

/// Answers one request from `peer`.
#[must_use]
pub fn respond(
    asker: Option<&Asker<'_>>,
    secret: &token::Secret,
    now: Timestamp,
    (method, path, headers): (&Method, &str, &HeaderMap),
) -> Reply {
    // A proxy in the guest that passes on requests of strangers says so with this header (as EC2: never through a proxy).
    if headers.contains_key("x-forwarded-for") {
        return Reply::error(StatusCode::FORBIDDEN);
    }
    let Some(asker) = asker else { return Reply::error(StatusCode::NOT_FOUND) };
    // Clients join paths carelessly: `//` and a trailing `/` mean nothing.
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    if parts.get(1..) == Some(&["api", "token"]) {
        return token::issue(asker, secret, now, method, headers);
    }
    if *method != Method::GET && *method != Method::HEAD {
        return Reply::error(StatusCode::METHOD_NOT_ALLOWED);
    }
    if !token::fine(asker, secret, now, headers) {
        return Reply::error(StatusCode::UNAUTHORIZED);
    }
    let found = match parts.split_first() {
        None => Some(Reply::text("1.0\n2009-04-04\n2021-03-23\nlatest\nopenstack")),
        Some((&"openstack", rest)) => openstack::get(asker, rest),
        Some((version, rest)) if ec2::VERSIONS.contains(version) => ec2::get(asker, rest),
        Some(_) => None,
    };
    found.unwrap_or_else(|| Reply::error(StatusCode::NOT_FOUND))
}

#[cfg(test)]
mod tests;
