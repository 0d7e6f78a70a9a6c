//! How much a client may ask for, and what becomes of those who ask for more.
use super::estate::{ATTACH_STUCK, Estate, PATIENCE, fault, wait_until};
use plimsoll_host::api::client::{Client, ClientError};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

#[test]
fn bodies_and_heads_are_bounded_and_a_body_that_is_no_json_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let large = format!("{{\"group\": \"{}\"}}", "x".repeat(70 << 10));
    let answer = estate.send("PATCH", "/v1/machines/m1", &large);
    assert_eq!(answer.status, 413, "{}", fault(&answer));
    let kind = [("content-type", "text/plain")];
    let answer = estate.client().exchange("PATCH", "/v1/machines/m1", &kind, b"{}".to_vec()).unwrap();
    assert_eq!(answer.status, 415, "{}", fault(&answer));
    let long = format!("/v1/machines/{}", "x".repeat(8 << 10));
    let answer = estate.get(&long);
    assert_eq!(answer.status, 404);
    assert!(fault(&answer).message.len() < 200, "a name is not said back whole");
    let longer = format!("/v1/machines/{}", "x".repeat(20 << 10));
    let answer = estate.client().exchange("GET", &longer, &[], Vec::new());
    assert!(answer.is_err() || answer.is_ok_and(|answer| matches!(answer.status, 414 | 431)));
    assert_eq!(estate.get("/v1/host").status, 200, "and it goes on");
}

#[test]
fn clients_that_say_nothing_keep_nobody_from_the_loop_and_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let socket = folder.path().join("api.sock");
    let silent: Vec<UnixStream> = (0..64).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut one_more = UnixStream::connect(&socket).unwrap();
    one_more.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    one_more.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 429 ") && answer.contains("64 clients are connected already"),
        "{answer}"
    );
    let mut one = silent.into_iter().next().unwrap();
    one.set_read_timeout(Some(PATIENCE)).unwrap();
    one.write_all(b"GET /v1/host HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    one.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    wait_until("those who have gone are forgotten", || {
        estate.client().get::<serde_json::Value>("/v1/host").is_ok()
    });
}

#[test]
fn a_machine_that_is_being_attached_to_counts_until_that_has_ended_also_when_its_client_has_gone() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let socket = folder.path().join("api.sock");
    let saying = |text: &str| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    };
    let clients: Vec<UnixStream> = (0..4).map(|_| saying(ATTACH_STUCK)).collect();
    wait_until("all are being attached to", || *estate.gate.openings.lock() == 4);
    // That they have gone is known when others have their places.
    let silent: Vec<UnixStream> = (0..60).map(|_| saying("")).collect();
    drop(clients);
    let mut heirs = Vec::new();
    wait_until("their places are free", || {
        let mut stream = saying("GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n");
        let mut begin = [0; 12];
        let is_heard = stream.read_exact(&mut begin).is_ok() && &begin == b"HTTP/1.1 200";
        heirs.extend(is_heard.then_some(stream));
        heirs.len() == 4
    });
    drop((silent, heirs));
    wait_until("there is a place", || estate.get("/v1/host").status == 200);
    let refused = estate.send("POST", "/v1/machines", r#"{"machine": "other"}"#);
    assert_eq!(refused.status, 429, "{}", fault(&refused));
    assert_eq!(fault(&refused).message, "4 machines are being attached to");
    estate.gate.open();
    wait_until("that has ended", || {
        estate.send("POST", "/v1/machines", r#"{"machine": "other"}"#).status == 201
    });
}

#[test]
fn a_socket_that_nobody_serves_any_more_is_told_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let gone = Client::of(folder.path()).get::<serde_json::Value>("/v1/host");
    assert!(matches!(gone, Err(ClientError::NoDaemon { .. })), "{gone:?}");
    drop(Estate::start(folder.path(), 0, 1024));
    assert!(folder.path().join("api.sock").exists(), "what a killed manager leaves");
    let stale = Client::of(folder.path()).get::<serde_json::Value>("/v1/host").unwrap_err();
    assert!(stale.to_string().contains("start one with `plimsoll daemon --budget SIZE`"), "{stale}");
    let estate = Estate::start(folder.path(), 0, 1024);
    assert_eq!(estate.get("/v1/host").status, 200);
}
