use super::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

/// Plays the far end: greets, then answers each line through `answer` (text to send back, may be several lines).
fn server(mut far: UnixStream, mut answer: impl FnMut(&Value) -> String + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        far.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
        let (read, mut write) = far.into_split();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let request: Value = serde_json::from_str(&line).unwrap();
            let reply = if request["execute"] == "qmp_capabilities" {
                json!({"return": {}, "id": request["id"]}).to_string()
            } else {
                answer(&request)
            };
            if write.write_all(format!("{reply}\r\n").as_bytes()).await.is_err() {
                return;
            }
        }
    })
}

async fn connected(answer: impl FnMut(&Value) -> String + Send + 'static) -> Qmp {
    let (near, far) = UnixStream::pair().unwrap();
    server(far, answer);
    Qmp::from_stream(near, Duration::from_secs(5)).await.unwrap()
}

#[tokio::test]
async fn answers_reach_the_caller_that_asked_and_events_everyone() {
    let qmp = connected(|request| {
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
        format!("{event}\r\n{}", json!({"return": {"echo": request["arguments"]["n"]}, "id": request["id"]}))
    })
    .await;
    let mut events = qmp.events();
    let (a, b) = tokio::join!(qmp.execute("x", json!({"n": 1})), qmp.execute("x", json!({"n": 2})));
    assert_eq!(a.unwrap()["echo"], 1);
    assert_eq!(b.unwrap()["echo"], 2);
    assert_eq!(events.recv().await.unwrap().name, "STOP");
}

#[tokio::test]
async fn refusals_keep_class_and_text() {
    let qmp = connected(|request| {
        json!({"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": request["id"]}).to_string()
    })
    .await;
    let error = qmp.execute("device_del", json!({"id": "x"})).await.unwrap_err();
    assert!(error.is_class("DeviceNotFound") && error.says("not found"));
    assert_eq!(error.to_string(), "Device 'x' not found");
}

#[tokio::test]
async fn silence_ends_at_the_deadline_and_leaves_nothing_behind() {
    let qmp = connected(|_| "{\"return\": 1, \"id\": 99999}".into()).await;
    let error = qmp.execute_with("stop", Value::Null, None, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    assert!(lock(&qmp.pending).is_empty());
}

#[tokio::test]
async fn a_closed_connection_fails_the_waiting_and_the_later() {
    let (near, far) = UnixStream::pair().unwrap();
    let task = server(far, |_| r#"{"event": "RESUME"}"#.to_string());
    let qmp = Qmp::from_stream(near, Duration::from_secs(5)).await.unwrap();
    let mut events = qmp.events();
    let waiting = qmp.execute("quit", Value::Null);
    let closer = async {
        events.recv().await.unwrap();
        task.abort();
    };
    let (waited, ()) = tokio::join!(waiting, closer);
    assert_eq!(waited.unwrap_err(), QmpError::Closed);
    assert_eq!(qmp.execute("stop", Value::Null).await.unwrap_err(), QmpError::Closed);
}

#[tokio::test]
async fn hostile_far_ends_are_refused() {
    let cases: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"SSH-2.0-dropbear\r\n".to_vec(),
        b"{\"event\": \"STOP\"}\r\n".to_vec(),
        format!("{}{}\n", "[".repeat(5000), "]".repeat(5000)).into_bytes(),
        vec![b'x'; MAX_LINE + 8192],
        vec![0xff; 64],
        b"{\"QMP\": {}}\n{\"return\": {}}\n".to_vec(),
        b"{\"QMP\": {}}\n{\"return\": {}, \"id\": -5}\n{\"id\": 1}\n".to_vec(),
        b"{\"QMP\": {}}\n\xff\xfe\n".to_vec(),
    ];
    for case in cases {
        let (near, mut far) = UnixStream::pair().unwrap();
        let shown = String::from_utf8_lossy(&case[..case.len().min(40)]).into_owned();
        let feed = tokio::spawn(async move {
            let _ = far.write_all(&case).await;
            let _ = far.shutdown().await;
            let mut sink = Vec::new();
            let _ = far.read_to_end(&mut sink).await;
        });
        let result = Qmp::from_stream(near, Duration::from_secs(5)).await;
        assert!(
            matches!(result, Err(QmpError::Protocol(_) | QmpError::Closed)),
            "{shown}: {:?}",
            result.map(|_| "accepted").map_err(|e| e.to_string())
        );
        feed.abort();
    }
}

#[tokio::test]
async fn a_flood_of_events_stays_bounded_and_answers_still_come() {
    let qmp = connected(|request| {
        let flood = r#"{"event": "RTC_CHANGE", "data": {"offset": 1}}"#.to_string() + "\r\n";
        flood.repeat(EVENT_BUFFER * 4) + &json!({"return": {}, "id": request["id"]}).to_string()
    })
    .await;
    let mut events = qmp.events();
    qmp.execute("query-status", Value::Null).await.unwrap();
    assert!(matches!(events.recv().await, Err(broadcast::error::RecvError::Lagged(_))));
    assert_eq!(events.recv().await.unwrap().name, "RTC_CHANGE");
}

#[tokio::test]
async fn hands_descriptors_over() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let task = tokio::spawn(async move {
        far.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
        let mut buffer = [0u8; 4096];
        let n = far.read(&mut buffer).await.unwrap();
        assert!(buffer[..n].ends_with(b"\n"));
        far.write_all(b"{\"return\": {}, \"id\": 1}\n").await.unwrap();
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let got = far
            .async_io(tokio::io::Interest::READABLE, || {
                let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
                let flags = nix::sys::socket::MsgFlags::empty();
                let message = nix::sys::socket::recvmsg::<()>(far.as_raw_fd(), &mut slices, Some(&mut space), flags)
                    .map_err(std::io::Error::from)?;
                let mut fds = Vec::new();
                for part in message.cmsgs().map_err(std::io::Error::from)? {
                    if let nix::sys::socket::ControlMessageOwned::ScmRights(more) = part {
                        fds.extend(more);
                    }
                }
                Ok(fds)
            })
            .await
            .unwrap();
        far.write_all(b"{\"return\": {\"fdset-id\": 7}, \"id\": 2}\n").await.unwrap();
        got
    });
    let qmp = Qmp::from_stream(near, Duration::from_secs(5)).await.unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let answer = qmp.execute_with_fd("add-fd", json!({"fdset-id": 7}), std::os::fd::AsFd::as_fd(&file)).await.unwrap();
    assert_eq!(answer["fdset-id"], 7);
    let got = task.await.unwrap();
    assert_eq!(got.len(), 1);
    let shown = std::fs::read_link(format!("/proc/self/fd/{}", got[0])).unwrap();
    assert_eq!(shown, std::path::PathBuf::from("/dev/null"));
    nix::unistd::close(got[0]).unwrap();
}

proptest::proptest! {
    #[test]
    fn any_line_parses_or_is_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let _ = parse_line(&bytes);
    }
}
