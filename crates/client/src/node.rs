//! The calls of an agent. See [`oblak_model::wire`] for the protocol.

use std::time::Duration;

use oblak_model::wire::{
    Heartbeat, HeartbeatAnswer, NodeCertificate, NodeEvent, Register, Registered, RenewCertificate, Report,
    ReportAnswer,
};
use oblak_model::{ImageId, NodeId};

use crate::Result;
use crate::sse::Parser;
use crate::streams::{RawBytes, raw_bytes};
use crate::transport::{Client, ClientError, TextStream};

/// The byte stream that carries yamux to the API server.
pub type Tunnel = RawBytes;

/// The server says something every 10 seconds. Three times nothing: the other end of the connection is gone, and nobody will say so.
const SILENCE: Duration = Duration::from_secs(30);

fn silent() -> ClientError {
    ClientError::Answer(format!("nothing was heard on the watch for {} s", SILENCE.as_secs()))
}

/// Objects that concern a node.
#[derive(Debug)]
pub struct NodeWatch {
    body: TextStream,
    parser: Parser,
}

impl NodeWatch {
    /// The next event; `None` when the server ended the stream: watch again.
    ///
    /// # Errors
    /// A broken or silent connection or an answer that cannot be read: watch again.
    pub async fn next(&mut self) -> Result<Option<NodeEvent>> {
        loop {
            while let Some(event) = self.parser.next_event().map_err(ClientError::Answer)? {
                if event.name == "error" {
                    let problem: oblak_model::ApiError =
                        serde_json::from_str(&event.data).map_err(|e| ClientError::Answer(e.to_string()))?;
                    return Err(problem.into());
                }
                if event.name.is_empty() || event.name == "node" {
                    return serde_json::from_str(&event.data)
                        .map(Some)
                        .map_err(|e| ClientError::Answer(format!("a node event: {e}")));
                }
            }
            let next = tokio::time::timeout(SILENCE, self.body.next()).await;
            match next.map_err(|_| silent())?? {
                Some(bytes) => self.parser.push(&bytes),
                None => return Ok(None),
            }
        }
    }
}

impl Client {
    /// Makes or updates the node and starts its lease.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_register(&self, node: NodeId, body: &Register) -> Result<Registered> {
        self.post_json(&format!("/v1/nodes/{node}/register"), body).await
    }
    /// Renews the lease.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_heartbeat(&self, node: NodeId, body: &Heartbeat) -> Result<HeartbeatAnswer> {
        self.post_json(&format!("/v1/nodes/{node}/heartbeat"), body).await
    }
    /// Reports status.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_report(&self, node: NodeId, body: &Report) -> Result<ReportAnswer> {
        self.post_json(&format!("/v1/nodes/{node}/report"), body).await
    }
    /// Asks for the next certificate. `csr_pem` is a request (PKCS #10) with the node's next key.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_certificate(&self, node: NodeId, csr_pem: &str) -> Result<NodeCertificate> {
        let body = RenewCertificate { csr_pem: csr_pem.into() };
        self.post_json(&format!("/v1/nodes/{node}/certificate"), &body).await
    }
    /// The content of an image that an instance of the node uses, as another node exports it.
    ///
    /// # Errors
    /// As every call; `node_unreachable` when no other node that has it is connected.
    pub async fn node_image(&self, node: NodeId, image: ImageId) -> Result<TextStream> {
        self.get_stream(&format!("/v1/nodes/{node}/images/{image}/content")).await
    }
    /// Everything that concerns the node, then changes.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_watch(&self, node: NodeId) -> Result<NodeWatch> {
        let body = self.get_stream(&format!("/v1/nodes/{node}/watch")).await?;
        Ok(NodeWatch { body, parser: Parser::default() })
    }
    /// The tunnel's byte stream. The caller runs yamux on it, as its *server* side: the API opens streams.
    ///
    /// # Errors
    /// As every call.
    pub async fn node_tunnel(&self, node: NodeId) -> Result<Tunnel> {
        Ok(raw_bytes(self.open(&format!("/v1/nodes/{node}/tunnel")).await?))
    }
}
