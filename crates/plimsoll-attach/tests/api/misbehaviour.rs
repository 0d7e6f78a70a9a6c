//! VMMs that are not there, go away, get stuck, talk nonsense or talk too much. Each costs one request, in bounded time.
use crate::server::{Folder, Pace, Reply, Server, deserted, json_answer};
use crate::{DRIVERS, PATIENCE};
use plimsoll_attach::control::{Control, ControlError, Fault, Firecracker, RunState};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

/// For tests in which no answer comes.
const SHORT: Duration = Duration::from_millis(150);
/// What a stuck request may take beyond its patience on a busy machine.
const GRACE: Duration = Duration::from_secs(60);

fn running() -> Value {
    json!({ "app_name": "", "id": "", "vmm_version": "", "state": "Running", "config": { "payload": {} } })
}

/// The error every driver gives for a server that does this to each request.
fn errors(reply: &Reply, patience: Duration) -> Vec<ControlError> {
    let outcome = |(name, driver): &(&str, crate::Driver)| {
        let reply = reply.clone();
        let server = Server::start(move |_| reply.clone());
        let start = Instant::now();
        let outcome = driver(server.socket(), patience).run_state();
        assert!(start.elapsed() < patience + GRACE, "{name} took {:?}", start.elapsed());
        outcome.expect_err(name)
    };
    DRIVERS.iter().map(outcome).collect()
}

fn head(fields: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n").into_bytes()
}

#[test]
fn a_socket_that_is_missing_or_deserted_is_a_matter_of_set_up() {
    let folder = Folder::new();
    deserted(&folder.join("deserted.sock"));
    let long = "x".repeat(200);
    for (path, (_, driver)) in ["missing.sock", "deserted.sock", &long]
        .into_iter()
        .flat_map(|path| DRIVERS.iter().map(move |driver| (path, driver)))
    {
        let error = driver(folder.join(path), PATIENCE).run_state().unwrap_err();
        assert!(matches!(error, ControlError::Unreachable { .. }), "{error}");
        assert_eq!(error.fault(), Fault::Setup);
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn a_listener_that_accepts_nobody_is_not_waited_for_without_end() {
    let folder = Folder::new();
    let address = SocketAddrUnix::new(folder.join("full.sock")).unwrap();
    let socket = || -> OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = socket();
    net::bind(&listener, &address).unwrap();
    net::listen(&listener, 0).unwrap();
    let fill: Vec<OwnedFd> = (0..8).map(|_| socket()).collect();
    assert!(fill.iter().any(|client| net::connect(client, &address).is_err()), "the queue is full");
    let error = Firecracker::new(folder.join("full.sock"), SHORT).run_state().unwrap_err();
    assert!(matches!(error, ControlError::Stalled { .. }), "{error}");
}

#[test]
fn an_answer_that_ends_early_is_lost() {
    let whole = json_answer(200, &running());
    for end in [0, 1, 20, whole.len() - 1] {
        for error in errors(&Reply::RawThenClose(whole[..end].to_vec()), PATIENCE) {
            assert!(matches!(error, ControlError::Lost { .. }), "after {end} bytes: {error}");
            assert_eq!(error.fault(), Fault::Vmm);
        }
    }
    for half in ["5\r\nab", "5\r\nabcde\r\n", "5\r"] {
        let mut chunked = head("Transfer-Encoding: chunked");
        chunked.extend_from_slice(half.as_bytes());
        for error in errors(&Reply::RawThenClose(chunked.clone()), PATIENCE) {
            assert!(matches!(error, ControlError::Lost { .. }), "after {half:?}: {error}");
        }
    }
}

#[test]
fn an_answer_that_does_not_come_or_dribbles_stalls_for_the_drivers_patience_only() {
    let whole = json_answer(200, &running());
    let slow_head = Reply::Forever(b"H".to_vec(), Pace::Slow);
    let slow_interim = Reply::Forever(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), Pace::Slow);
    let stalls = [Reply::RawThenStall(Vec::new()), Reply::RawThenStall(whole[..30].to_vec()), slow_interim];
    for reply in stalls {
        for error in errors(&reply, SHORT) {
            assert!(matches!(error, ControlError::Stalled { .. }), "{reply:?}: {error}");
        }
    }
    // Not a stall: it can be seen at once that this is no head.
    for error in errors(&slow_head, PATIENCE) {
        assert!(matches!(error, ControlError::Garbage { .. }), "{error}");
    }
}

#[test]
fn nonsense_is_called_garbage_and_quoted_without_its_control_characters() {
    let html = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\n{}".to_vec();
    let two_lengths = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}\n".to_vec();
    let nonsense = [
        b"\x1b[2J\x07SSH-2.0-OpenSSH\r\n\r\n".to_vec(),
        html,
        two_lengths,
        json_answer(200, &json!("not an object")),
        json_answer(200, &json!({ "state": 7, "config": { "payload": {} } })),
        json_answer(200, &json!({ "state": "Levitating", "config": { "payload": {} } })),
        [head("Content-Length: 4"), b"{\"\x1b[".to_vec()].concat(),
        head("Content-Length: -1"),
        head("Transfer-Encoding: gzip"),
        [head("Transfer-Encoding: chunked"), b"zz\r\n".to_vec()].concat(),
        [head("Transfer-Encoding: chunked"), b"2\r\n{}xx".to_vec()].concat(),
        b"HTTP/1.1 204 \r\n\r\n".to_vec(),
    ];
    for bytes in nonsense {
        for error in errors(&Reply::RawThenClose(bytes.clone()), PATIENCE) {
            assert!(
                matches!(error, ControlError::Garbage { .. }),
                "{:?}: {error}",
                String::from_utf8_lossy(&bytes)
            );
            assert!(!error.to_string().contains(char::is_control), "{error:?}");
        }
    }
}

#[test]
fn an_answer_without_bounds_is_cut_off() {
    let chunk = [b"4000\r\n".to_vec(), vec![b' '; 0x4000], b"\r\n".to_vec()].concat();
    let endless = [
        Reply::Forever([b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 20_000]].concat(), Pace::Fast),
        Reply::Forever([head("X: y"), vec![b' '; 2 << 20]].concat(), Pace::Fast),
        Reply::Forever([head("Transfer-Encoding: chunked"), chunk.repeat(70)].concat(), Pace::Fast),
        Reply::RawThenStall(head("Content-Length: 999999999999")),
        Reply::RawThenStall([head("Transfer-Encoding: chunked"), b"ffffffffffffff\r\n".to_vec()].concat()),
    ];
    for reply in endless {
        for error in errors(&reply, PATIENCE) {
            assert!(matches!(error, ControlError::Garbage { .. }), "{error}");
            assert!(error.to_string().len() < 2000);
        }
    }
}

#[test]
fn a_vmm_that_refuses_everything_is_quoted() {
    let refusals = [
        (json!({ "fault_message": "The requested operation is not supported." }), "is not supported."),
        (json!(["Error from API", "The VM is not booted"]), "Error from API: The VM is not booted"),
        (Value::Null, "status 500 without a word"),
        (json!({ "another": "form" }), r#"{"another":"form"}"#),
    ];
    for (body, expected) in refusals {
        for error in errors(&Reply::Json(500, body), PATIENCE) {
            assert!(matches!(error, ControlError::Refused { .. }), "{error}");
            assert_eq!(error.fault(), Fault::Request);
            assert!(error.to_string().ends_with(expected), "{error}");
        }
    }
}

#[test]
fn one_connection_serves_many_requests() {
    for (name, driver) in DRIVERS {
        let server = Server::start(|_| Reply::Json(200, running()));
        let mut driver = driver(server.socket(), PATIENCE);
        for _ in 0..5 {
            assert_eq!(driver.run_state().unwrap(), RunState::Running, "{name}");
        }
        assert!(server.requests().iter().all(|request| request.connection == 1), "{:?}", server.requests());
    }
}

#[test]
fn a_connection_that_was_closed_in_between_is_made_anew() {
    let closes = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
    let body = running().to_string();
    let announced = format!("{closes}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
    let unbounded = format!("{closes}\r\n{body}").into_bytes();
    for answer in [json_answer(200, &running()), announced, unbounded] {
        let server = Server::start(move |_| Reply::RawThenClose(answer.clone()));
        let mut driver = Firecracker::new(server.socket(), PATIENCE);
        for connection in 1..4 {
            // The second may see the first one's end too late, once: then it is lost, and no worse.
            let state = driver.run_state().or_else(|_| driver.run_state());
            assert_eq!(state.unwrap(), RunState::Running);
            assert!(server.requests().last().unwrap().connection >= connection);
        }
    }
}

#[test]
fn an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one() {
    let paused = json!({ "app_name": "", "id": "", "vmm_version": "", "state": "Paused" });
    let twice = [json_answer(200, &running()), json_answer(200, &paused)].concat();
    let server = Server::start(move |_| Reply::Raw(twice.clone()));
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    for _ in 0..20 {
        assert_eq!(driver.run_state().unwrap(), RunState::Running);
    }
}

#[test]
fn an_answer_that_comes_between_two_requests_is_not_taken_for_the_next_one() {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.join("api.sock")).unwrap();
    let (go, told_to_go) = std::sync::mpsc::channel::<()>();
    let (done, was_done) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let paused = json!({ "app_name": "", "id": "", "vmm_version": "", "state": "Paused" });
        let (mut first, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        assert!(first.read(&mut request).unwrap() > 0);
        first.write_all(&json_answer(200, &running())).unwrap();
        told_to_go.recv().unwrap();
        first.write_all(&json_answer(200, &paused)).unwrap();
        done.send(()).unwrap();
        let (mut second, _) = listener.accept().unwrap();
        assert!(second.read(&mut request).unwrap() > 0);
        second.write_all(&json_answer(200, &running())).unwrap();
    });
    let mut driver = Firecracker::new(folder.join("api.sock"), PATIENCE);
    assert_eq!(driver.run_state().unwrap(), RunState::Running);
    go.send(()).unwrap();
    was_done.recv().unwrap();
    assert_eq!(driver.run_state().unwrap(), RunState::Running);
    server.join().unwrap();
}

#[test]
fn an_answer_that_comes_too_late_is_not_taken_for_the_next_one() {
    let mut first = true;
    let server = Server::start(move |_| {
        let late = std::mem::take(&mut first);
        if late { Reply::RawThenStall(Vec::new()) } else { Reply::Json(200, running()) }
    });
    let mut driver = Firecracker::new(server.socket(), SHORT);
    assert!(matches!(driver.run_state(), Err(ControlError::Stalled { .. })));
    let deadline = Instant::now() + GRACE;
    while driver.run_state().is_err() {
        assert!(Instant::now() < deadline, "the server answers again");
    }
    assert!(server.requests().last().unwrap().connection > 1);
}

#[test]
fn chunks_and_interim_answers_are_understood() {
    let body = running().to_string();
    let (left, right) = body.split_at(7);
    let chunks = format!("7\r\n{left}\r\n{:x};ext=1\r\n{right}\r\n0\r\n\r\n", right.len());
    let answer = [
        b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(),
        head("transfer-encoding: Chunked\r\ncontent-type: application/json; charset=utf-8"),
        chunks.into_bytes(),
    ];
    let answer = answer.concat();
    let server = Server::start(move |_| Reply::Raw(answer.clone()));
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    for _ in 0..3 {
        assert_eq!(driver.run_state().unwrap(), RunState::Running);
    }
    assert!(server.requests().iter().all(|request| request.connection == 1));
}

#[test]
fn a_vmm_that_vanishes_is_lost_once_and_then_unreachable() {
    let mut left = 2;
    let server = Server::start(move |_| {
        left -= 1;
        if left == 0 { Reply::Vanish } else { Reply::Json(200, running()) }
    });
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    assert_eq!(driver.run_state().unwrap(), RunState::Running);
    assert!(matches!(driver.run_state(), Err(ControlError::Lost { .. })));
    let deadline = Instant::now() + GRACE;
    while !matches!(driver.run_state(), Err(ControlError::Unreachable { .. })) {
        assert!(Instant::now() < deadline, "the socket goes with the server");
    }
}
