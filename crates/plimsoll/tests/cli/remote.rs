//! A daemon that others than its own user may ask: a group of its host, and clients with certificates.
use super::certificates::{Authority, Valid};
use super::daemon::{Directory, exists, has_told, manager_of, plimsoll, signal, start_with};
use super::run::{Ended, Run, can, wait_until};
use plimsoll_host::api::Credentials;
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tempfile::TempDir;

const STRANGER: &str = "65534";
const GROUP: u32 = 4242;

/// A verb by a stranger in these groups, its own first.
fn by_a_member(directory: &Directory, own: u32, others: &str, words: &[&str]) -> Ended {
    let (own, program) = (own.to_string(), env!("CARGO_BIN_EXE_plimsoll"));
    let who: &[&str] = match others {
        "" => &["--reuid", STRANGER, "--regid", &own, "--clear-groups", program],
        others => &["--reuid", STRANGER, "--regid", &own, "--groups", others, program],
    };
    Run::of(Path::new("setpriv"), &[who, words, &["--directory", directory.text()]].concat()).output()
}

/// What the certificates of a server are called in its settings, which lie beside them.
const FILES: &str = "certificate = \"server.pem\"\nkey = \"server.key\"\nclient-ca = \"own.ca\"\n";

/// A folder with a server's certificate, and who signed it.
fn certified() -> (TempDir, Authority) {
    let folder = tempfile::tempdir().unwrap();
    let own = Authority::new(folder.path(), "own");
    own.sign("server", &["localhost"], Valid::Now, "own");
    (folder, own)
}

#[test]
fn a_group_may_use_the_socket_as_its_settings_say_and_nobody_else_comes_that_far() {
    if !can("root") || !can("userfaultfd") {
        return;
    }
    let (directory, folder) = (Directory::new("group"), tempfile::tempdir().unwrap());
    let file = folder.path().join("host.toml");
    let say =
        |may: &str| fs::write(&file, format!("[api]\ngroup = \"{GROUP}\"\ngroup-may = \"{may}\"\n")).unwrap();
    say("read");
    let daemon = start_with(&directory, &["--budget", "64M", "--config", file.to_str().unwrap()]);
    wait_until("the API is served", || plimsoll(&directory, &["budget"]).code() == Some(0));
    let mode = |name: &str| {
        let found = fs::metadata(directory.0.join(name)).unwrap();
        (found.gid(), found.permissions().mode() & 0o7777)
    };
    assert_eq!([mode(""), mode("api.sock")], [(GROUP, 0o710), (GROUP, 0o660)]);
    assert_eq!([mode("control.sock").1, mode("handover.sock").1, mode("lock").1], [0o600; 3]);
    let other = format!("7,{GROUP},9");
    for (own, others) in [(GROUP, ""), (65534, &*other)] {
        by_a_member(&directory, own, others, &["budget"]).expect_code(0);
        let refused = by_a_member(&directory, own, others, &["budget", "72M"]);
        refused.expect_code(2);
        assert!(refused.stderr.contains("may read and change nothing"), "{}", refused.stderr);
    }
    let refused = by_a_member(&directory, 65534, "7,9", &["budget"]);
    refused.expect_code(2);
    assert!(refused.stderr.contains("or in the group that its settings name"), "{}", refused.stderr);
    say("change");
    daemon.signal(Signal::HUP);
    wait_until("it may change things", || {
        by_a_member(&directory, 65534, &other, &["budget", "72M"]).code() == Some(0)
    });
    let kept = fs::metadata(directory.0.join("said.json")).unwrap().permissions().mode();
    assert_eq!(kept & 0o077, 0, "what was said is the owner's");
    fs::write(&file, "").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("it may do nothing any more", || mode("api.sock").1 == 0o600);
    by_a_member(&directory, GROUP, "", &["budget"]).expect_code(2);
    fs::write(&file, "[api]\ngroup = \"no such group\"\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("a group that is not there is told", || has_told(&directory, "the group \"no such group\""));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    let words = ["daemon", "--budget", "64M", "--config", file.to_str().unwrap()];
    let refused = plimsoll(&directory, &words);
    refused.expect_code(2);
    assert!(refused.stderr.contains("groupadd --system"), "{}", refused.stderr);
}

#[test]
fn a_port_for_which_a_manager_has_no_right_is_refused_before_there_is_one() {
    if !can("root") {
        return;
    }
    let (directory, (folder, _)) = (Directory::new("port"), certified());
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    fs::write(&file, format!("[api]\nlisten = \"0.0.0.0:443\"\n{FILES}may-read = [\"*\"]\n")).unwrap();
    for words in [
        &["daemon", "--budget", "64M", "--directory", directory.text(), "--config", shown][..],
        &["config", "check", shown],
    ] {
        // In a network of its own, in which ports are as the kernel has them by itself.
        let program = ["--net", env!("CARGO_BIN_EXE_plimsoll")];
        let refused = Run::of(Path::new("unshare"), &[&program, words].concat()).output();
        refused.expect_code(2);
        let said = &refused.stderr;
        assert!(
            said.contains("cannot listen on 0.0.0.0:443") && said.contains("use one from 1024 on"),
            "{said}"
        );
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
}

#[test]
fn a_daemon_is_asked_over_tls_by_the_same_verbs_also_after_its_manager_was_replaced() {
    if !can("userfaultfd") {
        return;
    }
    let (directory, (folder, own)) = (Directory::new("tls"), certified());
    let ops = own.sign("cert", &["ops.test"], Valid::Now, "own");
    let watch = own.sign("watch", &["watch.test"], Valid::Now, "own");
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    let say = |listen: &str| {
        let roles = "may-change = [\"ops.test\"]\nmay-read = [\"*\"]\n";
        fs::write(&file, format!("[api]\nlisten = \"{listen}\"\n{FILES}{roles}")).unwrap();
    };
    // A port of which the kernel has just said that it is nobody's.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    say(&format!("127.0.0.1:{port}"));
    let key = folder.path().join("server.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    for words in [
        &["daemon", "--budget", "64M", "--directory", directory.text(), "--config", shown][..],
        &["config", "check", shown],
    ] {
        let refused = Run::new(words).output();
        refused.expect_code(2).expect_nothing_left();
        assert!(
            refused.stderr.contains("server.key\" is user") && refused.stderr.contains("mode 0644"),
            "{}",
            refused.stderr
        );
    }
    for (valid, said) in
        [(Valid::Before, "has expired on 2021-01-01"), (Valid::Later, "is not valid before 2119")]
    {
        own.sign("server", &["localhost"], valid, "own");
        let refused = Run::new(&["config", "check", shown]).output();
        refused.expect_code(2);
        assert!(refused.stderr.contains(said), "{}", refused.stderr);
    }
    own.sign("server", &["localhost"], Valid::Now, "own");
    Run::new(&["config", "check", shown]).output().expect_code(0);
    let daemon = start_with(&directory, &["--budget", "64M", "--config", shown]);
    let host = format!("https://localhost:{port}");
    let ask = |by: &Credentials, words: &[&str]| {
        let [cert, key, ca] = [&by.certificate, &by.key, &by.authority].map(|path| path.to_str().unwrap());
        let there = ["--host", &host, "--cert", cert, "--key", key, "--cacert", ca];
        Run::new(&[words, &there].concat()).output()
    };
    wait_until("it is served", || ask(&ops, &["budget"]).code() == Some(0));
    assert!(has_told(&directory, &format!("the API is served at https://127.0.0.1:{port}")));
    let changed = ask(&ops, &["budget", "72M", "--json"]);
    changed.expect_code(0);
    assert!(changed.stdout.contains(&format!("\"budget_bytes\":{}", 72 << 20)), "{}", changed.stdout);
    for words in [&["vm", "list"][..], &["line"], &["top", "--once"], &["budget"]] {
        ask(&watch, words).expect_code(0);
    }
    let refused = ask(&watch, &["budget", "64M"]);
    refused.expect_code(2);
    assert!(refused.stderr.contains("may read and change nothing"), "{}", refused.stderr);
    let refused = ask(&ops, &["vm", "attach", "web", "--qmp", "qmp.sock"]);
    assert!(refused.stderr.contains("on the daemon's host: use a path from /"), "{}", refused.stderr);

    // By the files of a folder, as a user keeps them.
    let home = tempfile::tempdir().unwrap();
    for (from, to) in [(&ops.certificate, "cert.pem"), (&ops.key, "key.pem"), (&ops.authority, "ca.pem")] {
        fs::copy(from, home.path().join(to)).unwrap();
    }
    let words = ["vm", "list", "--host", &host];
    Run::new(&words).with("PLIMSOLL_CERTS", home.path()).output().expect_code(0);

    // The next manager listens there as well.
    let killed = manager_of(&directory).unwrap();
    signal(killed, Signal::KILL);
    wait_until("another manager answers", || ask(&ops, &["budget"]).code() == Some(0) && !exists(killed));
    // Another certificate is shown once the settings are read again.
    own.sign("server", &["elsewhere.test"], Valid::Now, "own");
    daemon.signal(Signal::HUP);
    wait_until("it is shown", || {
        let refused = ask(&ops, &["budget"]);
        refused.code() == Some(2) && refused.stderr.contains("elsewhere.test")
    });
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
