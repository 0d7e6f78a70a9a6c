//! What is asked and answered; what is refused, and changes nothing.
use super::estate::{Estate, MIB, PATIENCE, SIZE, fault, wait_until};
use plimsoll_host::api::openapi;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

#[test]
fn the_checked_in_description_is_the_one_that_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 0, 1024);
    let served = String::from_utf8(estate.get("/openapi.json").body).unwrap();
    assert_eq!(served, openapi());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
    if std::env::var_os("PLIMSOLL_BLESS").is_some() {
        std::fs::write(path, &served).unwrap();
    }
    let checked_in = std::fs::read_to_string(path).unwrap();
    assert!(
        checked_in == served,
        "docs/openapi.json is not what is served: run this test with PLIMSOLL_BLESS=1"
    );
}

#[test]
fn every_page_follows_the_one_before_and_each_machine_is_on_one() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 25, 4096);
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = estate.json(&format!("/v1/machines?limit=10{after}"));
        assert_eq!(page["total"], 25);
        seen.extend(
            page["machines"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()),
        );
        let Some(next) = page["next"].as_u64() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(seen, (1..=25).map(|number| format!("m{number}")).collect::<Vec<_>>());
    assert!(estate.json("/v1/machines?after=25")["machines"].as_array().unwrap().is_empty());
    assert_eq!(estate.json("/v1/machines/100007")["name"], "m7", "a process id is a name, too");
}

/// Method, path, body; status, code, and a part of the sentence.
type Wrong = (&'static str, &'static str, &'static str, u16, &'static str, &'static str);

const SET: (&str, &str) = ("PATCH", "/v1/machines/m1");
const ATTACH: (&str, &str) = ("POST", "/v1/machines");
const TAKE: (&str, &str) = ("POST", "/v1/machines/m1/reclaim");
const BUDGET: (&str, &str) = ("PUT", "/v1/host/budget");

const WRONG: &[Wrong] = &[
    (SET.0, SET.1, r#"{"group": 1}"#, 422, "unprocessable", "group"),
    (SET.0, SET.1, r#"{"group": "nobody's"}"#, 422, "unprocessable", "there are inner, tenant"),
    (SET.0, SET.1, r#"{"kind": "pinned"}"#, 422, "unprocessable", "pinned"),
    (SET.0, SET.1, r#"{"highest": "tape"}"#, 422, "unprocessable", "tape"),
    (SET.0, SET.1, r#"{"sharez": 1}"#, 422, "unprocessable", "unknown field `sharez`"),
    (SET.0, SET.1, r#"{"shares": 0}"#, 422, "unprocessable", "m1 has 0 shares"),
    (SET.0, SET.1, r#"{"shares": 1000001}"#, 422, "unprocessable", "use at most 1000000"),
    (SET.0, SET.1, r#"{"stall_objective_ppm": 1000001}"#, 422, "unprocessable", "use at most 100 %"),
    (SET.0, SET.1, r#"{"reservation_bytes": 4097}"#, 422, "unprocessable", "use a multiple of 4096"),
    (SET.0, SET.1, r#"{"limit_bytes": 1099511627776}"#, 422, "unprocessable", "more than its size of 64M"),
    (
        SET.0,
        SET.1,
        r#"{"reservation_bytes": 33554432, "limit_bytes": 16777216}"#,
        422,
        "unprocessable",
        "m1 reserves 32M, more than its limit of 16M",
    ),
    (SET.0, SET.1, r#"{"minimum_bytes": 33554432}"#, 422, "unprocessable", "maximum_bytes is missing"),
    (
        SET.0,
        SET.1,
        r#"{"minimum_bytes": 33554432, "maximum_bytes": 16777216}"#,
        422,
        "unprocessable",
        "exchange them",
    ),
    (
        SET.0,
        SET.1,
        r#"{"minimum_bytes": 4096, "maximum_bytes": 16777216, "weight": 10001}"#,
        422,
        "unprocessable",
        "use at most 10000",
    ),
    (
        SET.0,
        SET.1,
        r#"{"minimum_bytes": 4096, "maximum_bytes": 16777216, "buffer_ppm": 20000001}"#,
        422,
        "unprocessable",
        "use at most 2000 %",
    ),
    (SET.0, SET.1, r#"{"shares": 1, "weight": 1}"#, 422, "unprocessable", "words of two kinds"),
    (SET.0, SET.1, r#"{"kind": "static", "shares": 1}"#, 422, "unprocessable", "words of two kinds"),
    (SET.0, SET.1, "[1]", 422, "unprocessable", "the body makes no sense"),
    (SET.0, SET.1, "{", 400, "bad_request", "EOF"),
    (SET.0, SET.1, "\u{0}", 400, "bad_request", "the body makes no sense"),
    ("PATCH", "/v1/machines/nobody", "{}", 404, "not_found", "no machine is called \"nobody\""),
    ("PATCH", "/v1/machines/m1?x=1", "{}", 400, "bad_request", "x"),
    (ATTACH.0, ATTACH.1, "{}", 422, "unprocessable", "missing field `machine`"),
    (ATTACH.0, ATTACH.1, r#"{"machine": "nobody"}"#, 404, "not_found", "nobody"),
    (ATTACH.0, ATTACH.1, r#"{"machine": "m1"}"#, 409, "conflict", "a machine called m1 is managed already"),
    (
        ATTACH.0,
        ATTACH.1,
        r#"{"machine": "m9", "settings": {"reservation_bytes": 67108864, "limit_bytes": 4096}}"#,
        422,
        "unprocessable",
        "more than its limit",
    ),
    (ATTACH.0, ATTACH.1, r#"{"machine": ""}"#, 422, "unprocessable", "1 to 256 characters"),
    (ATTACH.0, ATTACH.1, r#"{"machine": "m9", "pid": 3}"#, 422, "unprocessable", "unknown field `pid`"),
    (TAKE.0, TAKE.1, r#"{"bytes": 0}"#, 422, "unprocessable", "use 4096 to"),
    (TAKE.0, TAKE.1, r#"{"bytes": 1125899906842625}"#, 422, "unprocessable", "use 4096 to"),
    (TAKE.0, TAKE.1, r#"{"bytes": "64M"}"#, 422, "unprocessable", "bytes"),
    (
        BUDGET.0,
        BUDGET.1,
        r#"{"bytes": 1048576}"#,
        422,
        "unprocessable",
        "a machine cannot run in less than 32M",
    ),
    (BUDGET.0, BUDGET.1, r#"{"bytes": 1125899906842624}"#, 422, "unprocessable", "this host has"),
    ("GET", "/v1/machines?limit=0", "", 400, "bad_request", "a limit of 0: use 1 to 1000"),
    ("GET", "/v1/machines?limit=1001", "", 400, "bad_request", "a limit of 1001"),
    ("GET", "/v1/machines?limit=x", "", 400, "bad_request", "limit"),
    ("GET", "/v1/machines?after=-1", "", 400, "bad_request", "after"),
    ("GET", "/v1/machines?offset=1", "", 400, "bad_request", "offset"),
    ("GET", "/v1/machines?group=x", "", 422, "unprocessable", "there is no group \"x\""),
    ("GET", "/v1/machines/m1/pages?first=-1", "", 400, "bad_request", "first"),
    ("GET", "/v1/machines/m1/pages?last=1", "", 400, "bad_request", "last"),
    ("GET", "/v1/machines/m1/pages", "", 409, "conflict", "it is managed from outside"),
    ("GET", "/v1/machines/nobody/pages", "", 404, "not_found", "no machine is called \"nobody\""),
    ("GET", "/v2", "", 404, "not_found", "nothing at this path"),
    ("DELETE", "/v1/host", "", 405, "method_not_allowed", "cannot be done"),
];

#[test]
fn every_field_of_a_wrong_type_unit_range_or_name_is_refused_and_nothing_is_changed() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 2, 1024);
    let settings = || estate.json("/v1/machines/m1")["settings"].clone();
    let before = settings();
    let sizes = ["reservation_bytes", "limit_bytes", "startup_bytes", "minimum_bytes", "maximum_bytes"];
    let numbers = ["shares", "buffer_ppm", "weight", "stall_objective_ppm"];
    for field in sizes.into_iter().chain(numbers) {
        for value in ["\"512M\"", "-1", "1.5", "true", "[]", "{}", "18446744073709551616"] {
            let answer = estate.send(SET.0, SET.1, &format!("{{\"{field}\": {value}}}"));
            assert_eq!(answer.status, 422, "{field}: {value}");
            assert!(fault(&answer).message.contains(field), "{}", fault(&answer));
        }
    }
    for size in sizes {
        let answer = estate.send(
            SET.0,
            SET.1,
            &format!("{{\"{size}\": 4097, \"minimum_bytes\": 4097, \"maximum_bytes\": 4097}}"),
        );
        assert_eq!(answer.status, 422, "{size}");
    }
    for (method, path, body, status, code, part) in WRONG {
        let answer = estate.send(method, path, body);
        let fault = fault(&answer);
        assert_eq!(answer.status, *status, "{method} {path} {body}: {fault}");
        assert_eq!(serde_json::to_value(fault.code).unwrap(), *code, "{method} {path} {body}");
        assert!(fault.message.contains(part), "{method} {path} {body}: {fault}");
        assert!(!fault.help.is_empty() && !fault.message.contains('\n'), "{fault}");
    }
    assert_eq!(settings(), before);
    assert_eq!(estate.json("/v1/host")["budget_bytes"], 1024 * MIB);
    assert_eq!(estate.json("/v1/machines")["total"], 2);
    assert!(!folder.path().join("said.json").exists(), "nothing that was refused is kept");
}

#[test]
fn what_was_said_is_in_force_when_it_is_answered_and_for_the_next_manager() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 2, 1024);
    let body = format!(
        "{{\"minimum_bytes\": {}, \"maximum_bytes\": {SIZE}, \"weight\": 7, \"group\": \"inner\"}}",
        16 * MIB
    );
    let answer = estate.send("PATCH", "/v1/machines/m1", &body);
    assert_eq!(answer.status, 200);
    let shown = estate.json("/v1/machines/m1");
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap()["settings"],
        shown["settings"]
    );
    let settings = &shown["settings"];
    assert_eq!((&settings["kind"], &settings["weight"]), (&"dynamic".into(), &7.into()));
    assert_eq!((&settings["startup_bytes"], &settings["group"]), (&(16 * MIB).into(), &"inner".into()));
    let groups = estate.json("/v1/groups")["groups"].clone();
    let inner = groups.as_array().unwrap().iter().find(|group| group["name"] == "inner").unwrap().clone();
    assert_eq!((&inner["machines"], &inner["parent"]), (&1.into(), &"tenant".into()));
    let attached = estate.send("POST", "/v1/machines", r#"{"machine": "web", "settings": {"shares": 9}}"#);
    assert_eq!(attached.status, 201, "{}", String::from_utf8_lossy(&attached.body));
    assert_eq!(estate.send("POST", "/v1/machines/web/pause", "").status, 200);
    assert_eq!(estate.json("/v1/machines/web")["state"], "paused");
    assert_eq!(estate.send("PUT", "/v1/host/budget", &format!("{{\"bytes\": {}}}", 512 * MIB)).status, 200);
    assert!(estate.notes.lock().iter().any(|note| note == "web has no balloon"));
    drop(estate);

    let next = Estate::start(folder.path(), 0, 1024);
    let host = next.json("/v1/host");
    assert_eq!(host["budget_bytes"], 512 * MIB);
    assert_eq!(host["waiting"][0]["name"], "web", "it is looked for again");
    // Of a machine that comes again.
    let back = next.send("POST", "/v1/machines", r#"{"machine": "m1"}"#);
    let back: serde_json::Value = serde_json::from_slice(&back.body).unwrap();
    assert_eq!(back["settings"]["weight"], 7);
    assert_eq!(next.send("DELETE", "/v1/machines/m1", "").status, 204);
    assert_eq!(next.get("/v1/machines/m1").status, 404);
}

#[test]
fn what_cannot_be_kept_is_not_in_force() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let before = estate.json("/v1/machines/m1")["settings"].clone();
    // Where the file is written first stands something else.
    std::fs::create_dir(folder.path().join("said.new")).unwrap();
    for (method, path, body) in [
        ("PATCH", "/v1/machines/m1", r#"{"shares": 9}"#),
        ("POST", "/v1/machines", r#"{"machine": "web"}"#),
        ("POST", "/v1/machines/m1/pause", ""),
        ("DELETE", "/v1/machines/m1", ""),
        ("PUT", "/v1/host/budget", r#"{"bytes": 536870912}"#),
    ] {
        let answer = estate.send(method, path, body);
        assert_eq!(answer.status, 500, "{method} {path}");
        assert!(fault(&answer).message.contains("said.json"), "{}", fault(&answer));
    }
    assert_eq!(estate.json("/v1/machines/m1")["settings"], before);
    assert_eq!(estate.json("/v1/machines")["total"], 1);
    assert_eq!(estate.json("/v1/host")["budget_bytes"], 1024 * MIB);
    assert_ne!(estate.json("/v1/machines/m1")["state"], "paused");
}

#[test]
fn nothing_is_taken_from_a_paused_machine_and_a_resumed_one_gives_again() {
    let folder = tempfile::tempdir().unwrap();
    // Four machines of 48 MiB on 200: memory is short, and all have more than they use.
    let estate = Estate::start(folder.path(), 4, 1024);
    assert_eq!(estate.send("POST", "/v1/machines/m1/pause", "").status, 200);
    assert_eq!(estate.send("PUT", "/v1/host/budget", &format!("{{\"bytes\": {}}}", 160 * MIB)).status, 200);
    let planned = |name: &&str| estate.body(name, |body| body.planned) > 0;
    wait_until("another gives", || ["m2", "m3", "m4"].iter().any(planned));
    let giver = ["m2", "m3", "m4"].into_iter().find(planned).unwrap();
    assert_eq!(estate.body("m1", |body| body.planned), 0);
    let refused = estate.send("POST", "/v1/machines/m1/reclaim", r#"{"bytes": 1048576}"#);
    assert_eq!(refused.status, 409);
    assert!(fault(&refused).help.contains("resume"));
    assert_eq!(estate.send("POST", "/v1/machines/m1/resume", "").status, 200);
    let taken = estate.send("POST", "/v1/machines/m1/reclaim", r#"{"bytes": 1048576}"#);
    assert_eq!(taken.status, 202);
    assert_eq!(estate.body("m1", |body| body.ordered), 256);
    let why = estate.json(&format!("/v1/machines/{giver}/why"));
    let sentences: Vec<&str> =
        why["entries"].as_array().unwrap().iter().map(|one| one["sentence"].as_str().unwrap()).collect();
    assert!(
        sentences.iter().any(|one| one.starts_with("it is taken from by compressing pages")),
        "{sentences:?}"
    );
    assert!(!estate.json(&format!("/v1/machines/{giver}/history"))["samples"].as_array().unwrap().is_empty());
    let line = estate.json("/v1/host/line");
    assert_eq!((&line["machines"], &line["total"]), (&4.into(), &(160 * MIB).into()));
}

#[test]
fn what_is_guaranteed_to_a_machine_is_not_taken_from_it_by_an_order_either() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    // It takes up 48 MiB.
    let reserved = format!("{{\"reservation_bytes\": {}}}", 40 * MIB);
    assert_eq!(estate.send("PATCH", "/v1/machines/m1", &reserved).status, 200);
    let take = format!("{{\"bytes\": {}}}", 30 * MIB);
    assert_eq!(estate.send("POST", "/v1/machines/m1/reclaim", &take).status, 202);
    assert_eq!(estate.body("m1", |body| body.ordered << 12), 8 * MIB);
    let refused = estate.send("POST", "/v1/machines/m1/reclaim", &take);
    assert_eq!(refused.status, 409);
    let message = fault(&refused).message;
    assert!(message.contains("it takes up 40M, and 40M are guaranteed to it"), "{message}");
    assert_eq!(estate.body("m1", |body| body.consumed), 40 * MIB);
}

#[test]
fn whoever_listens_hears_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 4, 1024);
    let mut stream = UnixStream::connect(folder.path().join("api.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("nothing is said"));
    let head: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
    assert!(head.iter().any(|line| line.contains("text/event-stream")), "{head:?}");
    assert_eq!(estate.send("PUT", "/v1/host/budget", &format!("{{\"bytes\": {}}}", 160 * MIB)).status, 200);
    let data = lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned));
    let mut data = data.map(|data| serde_json::from_str::<serde_json::Value>(&data).unwrap());
    let taken = data.find(|one| one["step"]["Take"].is_object()).unwrap();
    assert!(taken["machine"].as_str().unwrap().starts_with('m'));
    assert!(taken["sentence"].as_str().unwrap().starts_with("it is taken from"));
}
