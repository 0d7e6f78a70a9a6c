//! What programs of others make of it: schemathesis, which tries what the description allows and forbids, and promtool.
use super::estate::Estate;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The program, where `cargo xtask setup` has put it. A machine that lacks what `PLIMSOLL_REQUIRE` says it has is at fault.
fn program(capability: &str, path: &Path) -> Option<PathBuf> {
    if path.exists() {
        return Some(path.to_owned());
    }
    let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|name| name == capability);
    assert!(!is_required, "{capability} is required, and {} is missing", path.display());
    println!("SKIPPED: no {}: `cargo xtask setup` brings it", path.display());
    None
}

/// Passes connections to a TCP port on to a Unix socket, for clients that know no other.
fn relay(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for tcp in listener.incoming().flatten() {
            let Ok(unix) = UnixStream::connect(&socket) else { return };
            let (from, to) = (tcp.try_clone().unwrap(), unix.try_clone().unwrap());
            thread::spawn(move || pump(from, to, |to| drop(to.shutdown(Shutdown::Write))));
            thread::spawn(move || pump(unix, tcp, |to: &TcpStream| drop(to.shutdown(Shutdown::Both))));
        }
    });
    port
}

fn pump<W: Write>(mut from: impl Read, mut to: W, end: impl FnOnce(&W)) {
    let _ = io::copy(&mut from, &mut to);
    end(&to);
}

#[test]
fn schemathesis_finds_no_failure_no_hang_and_no_answer_outside_of_the_schema() {
    let Some(st) = program("schemathesis", &Path::new(ROOT).join("target/schemathesis/bin/st")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 20, 4096);
    let port = relay(folder.path().join("api.sock"));
    // A name that is there, so that requests come further than to the question whether it is.
    std::fs::write(folder.path().join("schemathesis.toml"), "[parameters]\n\"path.machine\" = \"m1\"\n")
        .unwrap();
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                  response_schema_conformance,negative_data_rejection,unsupported_method";
    let url = format!("http://127.0.0.1:{port}/openapi.json");
    let mut command = Command::new(st);
    command.current_dir(folder.path()).args(["--config-file", "schemathesis.toml", "run", &url]);
    // Events end only with their listener; what they are is tested elsewhere. Reclaim and release are tried on m1 only once.
    command.args([
        "--exclude-path",
        "/v1/events",
        "--phases",
        "examples,coverage,fuzzing",
        "--max-time",
        "20",
    ]);
    // One: in CPython 3.11 two threads that parse at once fail now and then (`AST constructor recursion depth mismatch`).
    command.args(["--workers", "1", "--checks", checks, "--request-timeout", "10", "--no-color"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(estate.get("/v1/host").status, 200, "and it goes on");
}

#[test]
fn promtool_finds_nothing_wrong_with_the_metrics_or_the_rules() {
    let Some(promtool) = program("promtool", Path::new("/var/cache/plimsoll/promtool")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 3, 1024);
    let page = estate.get("/metrics");
    assert_eq!(page.content_type, "text/plain; version=0.0.4; charset=utf-8");
    let mut check = Command::new(&promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(&page.body).unwrap();
    let checked = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&checked.stderr) + String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && said.is_empty(), "{said}\n{}", String::from_utf8_lossy(&page.body));
    for arguments in [["check", "rules", "plimsoll.rules.yml"], ["test", "rules", "plimsoll.test.yml"]] {
        let mut rules = Command::new(&promtool);
        let checked =
            rules.current_dir(Path::new(ROOT).join("contrib/prometheus")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "{said}");
    }
}

#[test]
fn what_dashboard_and_rules_ask_for_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let open = [("accept", "application/openmetrics-text; version=1.0.0")];
    let page = estate.client().exchange("GET", "/metrics", &open, Vec::new()).unwrap();
    assert!(page.content_type.starts_with("application/openmetrics-text"));
    let page = String::from_utf8(page.body).unwrap();
    assert!(page.ends_with("# EOF\n") && page.contains("# TYPE plimsoll_decisions counter\n"), "{page}");
    let served: Vec<&str> = page.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    for file in ["contrib/grafana/plimsoll.json", "contrib/prometheus/plimsoll.rules.yml"] {
        let text = std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        let is_name = |byte: char| byte.is_ascii_alphanumeric() || byte == '_';
        let asked: Vec<&str> =
            text.split(|byte| !is_name(byte)).filter(|word| word.starts_with("plimsoll_")).collect();
        assert!(asked.len() > 5, "{file}");
        for name in asked {
            assert!(served.contains(&name), "{file} asks for {name}, which is not served");
        }
    }
}
