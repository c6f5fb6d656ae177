//! Talking to a shim.

use std::path::Path;
use std::time::Duration;

use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::file;
use super::server::{read_line, with_short_path};

/// Asks the shim in `dir` for `op` with the fields of `args` and returns its answer.
///
/// # Errors
/// What the shim answered; `shim_unreachable` (retry) when nobody listens, `shim_timeout` (retry) after `deadline`.
pub async fn call(dir: &Path, op: &str, args: &impl Serialize, deadline: Duration) -> DriverResult<Value> {
    Ok(request(dir, op, args, deadline).await?.0)
}

/// [`call`] with a typed answer.
///
/// # Errors
/// As [`call`]; permanent when the answer has another shape.
pub async fn call_as<T: DeserializeOwned>(
    dir: &Path,
    op: &str,
    args: &impl Serialize,
    deadline: Duration,
) -> DriverResult<T> {
    let value = call(dir, op, args, deadline).await?;
    serde_json::from_value(value)
        .map_err(|e| DriverError::permanent("bad_answer", format!("shim of {}: {op}: {e}", dir.display())))
}

/// As [`call`] for a streaming operation: what follows the answer.
///
/// # Errors
/// As [`call`].
pub async fn open_stream(dir: &Path, op: &str, args: &impl Serialize, deadline: Duration) -> DriverResult<BoxDuplex> {
    Ok(Box::new(request(dir, op, args, deadline).await?.1))
}

async fn request(
    dir: &Path,
    op: &str,
    args: &impl Serialize,
    deadline: Duration,
) -> DriverResult<(Value, BufReader<UnixStream>)> {
    match tokio::time::timeout(deadline, exchange(dir, op, args)).await {
        Ok(result) => result,
        Err(_) => Err(DriverError::retry(
            "shim_timeout",
            format!("the shim of {} did not answer {op} within {deadline:?}", dir.display()),
        )),
    }
}

async fn exchange(dir: &Path, op: &str, args: &impl Serialize) -> DriverResult<(Value, BufReader<UnixStream>)> {
    let unreachable = |e: &std::io::Error| {
        DriverError::retry("shim_unreachable", format!("no shim answers in {}: {e}", dir.display()))
    };
    let mut request = serde_json::to_value(args).map_err(|e| DriverError::permanent("bad_request", e.to_string()))?;
    if request.is_null() {
        request = Value::Object(serde_json::Map::new());
    }
    request
        .as_object_mut()
        .ok_or_else(|| DriverError::permanent("bad_request", "arguments of a shim call must be an object"))?
        .insert("op".into(), op.into());
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    // Connecting to a unix socket does not wait unless the queue is full; then the deadline of the caller ends it.
    let stream = with_short_path(&dir.join(file::SOCKET), |p| std::os::unix::net::UnixStream::connect(p))
        .map_err(|e| unreachable(&e))?;
    stream.set_nonblocking(true).map_err(|e| unreachable(&e))?;
    let mut stream = BufReader::new(UnixStream::from_std(stream).map_err(|e| unreachable(&e))?);
    stream.write_all(&line).await.map_err(|e| unreachable(&e))?;
    let line = read_line(&mut stream)
        .await
        .map_err(|e| unreachable(&e))?
        .ok_or_else(|| DriverError::retry("shim_unreachable", format!("the shim in {} hung up", dir.display())))?;
    let mut answer: Value = serde_json::from_slice(&line)
        .map_err(|e| DriverError::permanent("bad_answer", format!("shim in {}: {e}", dir.display())))?;
    if let Some(error) = answer.get_mut("error") {
        return Err(serde_json::from_value(error.take())
            .unwrap_or_else(|e| DriverError::permanent("bad_answer", e.to_string())));
    }
    Ok((answer.get_mut("ok").map(Value::take).unwrap_or_default(), stream))
}
