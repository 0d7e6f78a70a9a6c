//! `plimsoll dashboard`: whom it answers, and what a browser makes of it.
use super::daemon::{Directory, Machine, plimsoll, start};
use super::run::{alone, can, wait_until};
use rustix::process::{Pid, Signal};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A dashboard, and the address it has printed.
struct Served {
    child: Child,
    url: String,
}

impl Served {
    fn start(directory: &Directory) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.args(["dashboard", "--directory", directory.text()]);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { child, url: url.trim_end().to_owned() }
    }

    /// Its `address:port`, and its token.
    fn parts(&self) -> (&str, &str) {
        self.url.strip_prefix("http://").unwrap().split_once("/#").unwrap()
    }

    /// Sends a request of those lines, and gives back what is answered.
    fn ask(&self, lines: &[&str]) -> String {
        let mut stream = TcpStream::connect(self.parts().0).unwrap();
        let text = format!("{}\r\nconnection: close\r\n\r\n", lines.join("\r\n"));
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn end(mut self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_dashboard_answers_its_own_page_with_the_token_and_nobody_else() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("dashboard-guard");
    let nobody = plimsoll(&directory, &["dashboard"]);
    nobody.expect_code(2);
    assert!(nobody.stderr.contains("no daemon answers"), "{}", nobody.stderr);
    let daemon = start(&directory);
    let outside = plimsoll(&directory, &["dashboard", "--listen", "0.0.0.0:0"]);
    outside.expect_code(2);
    assert!(outside.stderr.contains("not of the loop-back interface"), "{}", outside.stderr);
    let served = Served::start(&directory);
    let (address, token) = served.parts();
    let (host, known) = (format!("host: {address}"), format!("authorization: Bearer {token}"));
    let get = "GET /v1/host HTTP/1.1";
    let status = |lines: &[&str]| served.ask(lines).split(' ').nth(1).unwrap().to_owned();
    let page = served.ask(&["GET / HTTP/1.1", &host]);
    assert!(
        page.starts_with("HTTP/1.1 200") && page.contains("default-src 'none'; script-src 'self'"),
        "{page}"
    );
    assert!(!page.contains(token) && !page.to_lowercase().contains("access-control"), "{page}");
    assert!(served.ask(&[get, &host, &known]).contains("\"budget_bytes\":67108864"));
    let wrong = format!("authorization: Bearer {}", "0".repeat(token.len()));
    let (short, cookie) =
        (format!("authorization: Bearer {}", &token[1..]), format!("cookie: token={token}"));
    let rebound = "host: evil.example:80";
    for lines in [
        &[get, &host][..],
        &[get, &host, &wrong],
        &[get, &host, &short],
        &[get, &host, &cookie],
        &[get, rebound, &known],
        &[get, &host, rebound, &known],
        &[get, &known],
        &["GET / HTTP/1.1", rebound],
        &[get, &host, &known, "origin: http://evil.example"],
        &[get, &host, &known, "origin: null"],
        &[get, &host, &known, "sec-fetch-site: cross-site"],
    ] {
        let status = status(lines);
        assert!(status == "403" || status == "400", "{lines:?}: {status}");
    }
    for line in ["DELETE /v1/machines/web HTTP/1.1", "GET /metrics HTTP/1.1", "GET /v1/events HTTP/1.1"] {
        assert_eq!(status(&[line, &host, &known]), "404", "{line}");
    }
    assert_eq!(status(&["OPTIONS /v1/host HTTP/1.1", &host, "origin: http://evil.example"]), "403");
    let own = format!("origin: http://{address}");
    assert_eq!(status(&[get, &host, &known, &own, "sec-fetch-site: same-origin"]), "200");
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0);
    assert_eq!(status(&[get, &host, &known]), "503", "a daemon that has gone is said to have");
    served.end();
}

#[test]
fn a_browser_shows_the_dashboard_without_complaint_and_a_weight_changed_there_is_in_force() {
    let _alone = alone();
    if !can("userfaultfd") || !can("browser") {
        return;
    }
    let directory = Directory::new("dashboard");
    let daemon = start(&directory);
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);
    let shown = || -> serde_json::Value {
        let ended = plimsoll(&directory, &["vm", "show", "lonely", "--json"]);
        serde_json::from_str(&ended.stdout).unwrap_or_default()
    };
    wait_until("it is decided about", || shown()["memory"].is_object());
    let served = Served::start(&directory);
    let pictures = Path::new(ROOT).join("target/xtask/dashboard");
    fs::create_dir_all(&pictures).unwrap();
    let mut node = Command::new("node");
    node.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/dashboard.mjs"));
    node.arg(Path::new(ROOT).join("target/playwright")).arg(&served.url).arg(&pictures);
    let output = node.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(shown()["settings"]["shares"], 7321);
    served.end();
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
