//! The smallest HTTP client, for what guests serve.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Body of `GET path`, or what went wrong.
///
/// # Errors
/// Text about the connection, or the whole answer when it is not 200.
pub fn get(address: SocketAddr, path: &str) -> Result<String, String> {
    let patience = Duration::from_secs(3);
    let mut stream = TcpStream::connect_timeout(&address, patience).map_err(|e| format!("connect: {e}"))?;
    stream.set_read_timeout(Some(patience)).map_err(|e| e.to_string())?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: test\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|e| format!("write: {e}"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| format!("read: {e}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no answer: {answer:?}"))?;
    if head.contains(" 200 ") { Ok(body.to_string()) } else { Err(answer) }
}

/// A socket that holds a free port of the host until it is dropped.
///
/// # Panics
/// When no port is free.
#[must_use]
pub fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("0.0.0.0:0").expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}
