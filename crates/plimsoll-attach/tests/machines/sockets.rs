//! Control sockets: machines that answer well, and servers that misbehave in every way they can.

use crate::fake::Fake;
use crate::{MIB_64, nothing_known, unique};
use plimsoll_attach::control::ControlError;
use plimsoll_attach::qmp::{Limits, Qmp, QmpError};
use plimsoll_attach::vmm::Note;
use plimsoll_attach::{Change, Follower, Hazard, Refusal, Request, Rung, inspect};
use plimsoll_sys::HvaRange;
use plimsoll_types::ByteCount;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
/// For answers that come, on a busy machine too, and for those that do not.
const LONG: Limits = limits(Duration::from_secs(180));
const SHORT: Limits = limits(Duration::from_millis(300));

const fn limits(patience: Duration) -> Limits {
    Limits { connect: patience, reply: patience, line: 4096 }
}

/// A server on a socket in a folder of its own; it serves one connection, or each of several, in turn.
struct Server {
    socket: PathBuf,
    _folder: TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(connections: usize, mut serve: impl FnMut(UnixStream) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            listener.incoming().take(connections).for_each(|stream| serve(stream.unwrap()));
        });
        Self { socket, _folder: folder, thread: Some(thread) }
    }

    /// Sends those lines as soon as somebody connects, and then waits until the client hangs up.
    fn saying(lines: impl Into<String>) -> Self {
        let lines = lines.into();
        Self::start(1, move |mut stream| {
            // The client may hang up before it has read all.
            drop(stream.write_all(lines.as_bytes()));
            drop(stream.read_to_end(&mut Vec::new()));
        })
    }

    fn connect(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.socket, LONG)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that nobody came to still waits.
        drop(UnixStream::connect(&self.socket));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Answers commands as a QEMU does: what `answers` gives, or an error.
fn serve_qmp(stream: UnixStream, answers: &dyn Fn(&str) -> Option<Value>) {
    let mut output = stream.try_clone().unwrap();
    writeln!(output, "{GREETING}").unwrap();
    for line in BufReader::new(stream).lines() {
        let Ok(command) = line.map(|line| serde_json::from_str::<Value>(&line).unwrap()) else { break };
        let (name, id) = (command["execute"].as_str().unwrap(), &command["id"]);
        let answer = match name {
            "qmp_capabilities" => json!({ "return": {}, "id": id }),
            _ => match answers(name) {
                Some(value) => json!({ "return": value, "id": id }),
                None => {
                    json!({ "error": { "class": "CommandNotFound", "desc": "no such command" }, "id": id })
                }
            },
        };
        writeln!(output, r#"{{"event": "NOISE", "data": {{}}}}{}{answer}"#, '\n').unwrap();
    }
}

/// What a QEMU of that name with 64 MiB and those memory devices says.
fn qemu(name: &str, devices: Value, migration: &str) -> impl Fn(&str) -> Option<Value> + Send + 'static {
    let (name, migration) = (name.to_owned(), migration.to_owned());
    move |command| {
        Some(match command {
            "query-name" => json!({ "name": name }),
            "query-status" => json!({ "status": "running", "running": true }),
            "query-memory-size-summary" => json!({ "base-memory": MIB_64, "plugged-memory": 0 }),
            "query-memdev" => json!([{ "id": "m1", "size": 32 << 20, "share": true, "host-nodes": [1] }]),
            "query-memory-devices" => devices.clone(),
            "query-migrate" => json!({ "status": migration }),
            _ => return None,
        })
    }
}

fn dimm() -> Value {
    json!([{ "type": "dimm", "data": { "id": "d1", "memdev": "/objects/m1", "size": 32 << 20 } }])
}

fn with_qmp(socket: &Path) -> Request {
    Request { qmp: Some(socket.to_owned()), ..Request::default() }
}

fn text(outcome: Result<Qmp, QmpError>) -> String {
    outcome.map(drop).unwrap_err().to_string()
}

#[test]
fn events_between_command_and_answer_are_kept() {
    let server = Server::start(1, |stream| serve_qmp(stream, &qemu("web", json!([]), "completed")));
    let mut qmp = server.connect().unwrap();
    assert_eq!(qmp.name().unwrap().as_deref(), Some("web"));
    assert!(!qmp.migration().unwrap().unwrap().is_running());
    let mut events = 0;
    while let Some(event) = qmp.next_event(Duration::from_millis(20)).unwrap() {
        assert_eq!(event.name, "NOISE");
        events += 1;
    }
    assert_eq!(events, 3, "one before each answer");
}

#[test]
fn a_refused_command_is_told_in_qemus_words_and_the_next_one_works() {
    let server = Server::start(1, |stream| serve_qmp(stream, &qemu("web", json!([]), "none")));
    let mut qmp = server.connect().unwrap();
    let error = qmp.execute("nonsense", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused nonsense: no such command (CommandNotFound)");
    assert!(qmp.run_state().unwrap().running);
}

#[test]
fn an_answer_that_comes_too_late_is_not_taken_for_the_next_ones() {
    // Short enough to wait for it, and for both later answers to come in that time.
    let limits = Limits { reply: Duration::from_secs(2), ..LONG };
    // The second command's answer comes after the first's, which was given up.
    let server = Server::start(1, |stream| {
        let mut output = stream.try_clone().unwrap();
        writeln!(output, "{GREETING}").unwrap();
        let mut commands = BufReader::new(stream).lines();
        commands.next();
        writeln!(output, r#"{{"return": {{}}, "id": 0}}"#).unwrap();
        commands.next();
        commands.next();
        writeln!(
            output,
            r#"{{"return": {{"name": "late"}}, "id": 1}}{}{{"return": {{"name": "right"}}, "id": 2}}"#,
            '\n'
        )
        .unwrap();
        commands.next();
    });
    let mut qmp = Qmp::connect(&server.socket, limits).unwrap();
    assert!(matches!(qmp.name(), Err(QmpError::Stalled { .. })));
    assert_eq!(qmp.name().unwrap().as_deref(), Some("right"));
}

#[test]
fn a_socket_that_is_missing_or_has_no_listener_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    assert!(text(Qmp::connect(&socket, LONG)).starts_with("there is no QMP socket"));
    drop(UnixListener::bind(&socket).unwrap());
    assert!(text(Qmp::connect(&socket, LONG)).starts_with("nobody listens on"));
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    const TRIES: usize = 20;
    for (said, awaited) in [
        (String::new(), "a greeting"),
        (format!("{GREETING}\n"), "the answer to qmp_capabilities"),
        (GREETING.to_owned(), "a greeting"),
    ] {
        // Until the greeting has come, on a busy machine, it is the greeting that was waited for.
        let error =
            std::iter::repeat_with(|| text(Qmp::connect(&Server::saying(said.clone()).socket, SHORT)))
                .take(TRIES)
                .find(|error| error.contains(&format!("has not sent {awaited} for 300ms")));
        assert!(error.is_some(), "{awaited}");
    }
}

#[test]
fn a_listener_that_accepts_nobody_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let address = SocketAddrUnix::new(&socket).unwrap();
    let endpoint = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = endpoint();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    // Fill its queue.
    let waiting: Vec<_> = std::iter::repeat_with(endpoint)
        .take_while(|client| rustix::net::connect(client, &address).is_ok())
        .collect();
    assert!(waiting.len() < 10);
    let error = text(Qmp::connect(&socket, SHORT));
    assert!(error.contains("has not sent an accepted connection for 300ms"), "{error}");
}

#[test]
fn a_server_that_says_something_else_is_shown_with_what_it_said() {
    for said in [
        "HTTP/1.1 200 OK\n",
        "{}\n",
        "[1, 2]\n",
        "\u{fffd}\u{0}\n",
        "{\"QMP\": 1}\n",
        "QEMU 7.2.22 monitor - type 'help' for more information\n",
    ] {
        let error = text(Server::saying(said).connect());
        assert!(error.contains("does not speak QMP") && error.contains("not a greeting"), "{said}: {error}");
    }
    for answer in
        ["{\"id\": 0}", "{\"return\": {}, \"id\": 77}", "{\"return\": {}}", "{\"error\": 5, \"id\": 0}"]
    {
        let error = text(Server::saying(format!("{GREETING}\n{answer}\n")).connect());
        assert!(error.contains("not the answer to qmp_capabilities"), "{answer}: {error}");
    }
}

#[test]
fn a_server_that_hangs_up_is_told_with_what_it_owed() {
    for (said, owed) in [("", "a greeting"), (GREETING, "a greeting")] {
        let server = Server::start(1, move |mut stream| stream.write_all(said.as_bytes()).unwrap());
        let error = text(server.connect());
        assert!(error.ends_with(&format!("closed by the other side, which owed {owed}")), "{error}");
    }
}

#[test]
fn a_line_without_an_end_is_given_up() {
    let error = text(Server::saying("x".repeat(1 << 20)).connect());
    assert!(error.ends_with("sent a line of more than 4096 bytes"), "{error}");
}

#[test]
fn an_answer_without_what_it_should_have_is_shown() {
    let server = Server::start(1, |stream| serve_qmp(stream, &|_| Some(json!({ "status": 1 }))));
    let mut qmp = server.connect().unwrap();
    let error = qmp.run_state().unwrap_err().to_string();
    assert_eq!(error, r#"QEMU's answer to query-status lacks status: {"status":1}"#);
    assert!(matches!(qmp.memory_size(), Err(QmpError::Unexpected { .. })));
    assert!(matches!(qmp.memory_devices(), Err(QmpError::Unexpected { .. })));
    assert!(matches!(qmp.ram_blocks(), Err(QmpError::Unexpected { .. })));
}

#[test]
fn plugged_memory_is_found_with_the_control_socket() {
    let name = unique("plugged");
    let mut fake = Fake::start("qemu-system-x86_64", &format!("-name {name} -m size=64M,slots=4,maxmem=1G"));
    let base = fake.map(&format!("anonymous {MIB_64}"));
    let dimm_place = fake.map(&format!("memfd memory-backend-memfd {}", 32 << 20));
    let without = inspect(&fake.held(), &nothing_known()).unwrap();
    assert_eq!((without.size(), &without.notes[..]), (ByteCount::mib(64), &[Note::HotPlug][..]));

    let answers = qemu(&name, dimm(), "none");
    let server = Server::start(1, move |stream| serve_qmp(stream, &answers));
    let dossier = inspect(&fake.held(), &with_qmp(&server.socket)).unwrap();
    let found: Vec<_> =
        dossier.ram.iter().map(|range| (range.block.as_str(), range.hva, range.node)).collect();
    assert_eq!(found, [("ram", base, None), ("m1", dimm_place, Some(1))]);
    assert_eq!((dossier.run_state.as_deref(), dossier.notes.len()), (Some("running"), 0));
}

#[test]
fn memory_that_is_plugged_in_while_a_machine_is_followed_comes() {
    let name = unique("hotplug");
    let mut fake = Fake::start("qemu-system-x86_64", &format!("-name {name} -m size=64M,slots=4,maxmem=1G"));
    fake.tell(&format!("anonymous {MIB_64}"));
    let devices = Arc::new(Mutex::new(json!([])));
    let shared = devices.clone();
    let server = Server::start(3, move |stream| {
        let devices = shared.lock().unwrap().clone();
        serve_qmp(stream, &qemu(&name, devices, "none"));
    });
    let mut follower = Follower::new(fake.held(), with_qmp(&server.socket)).unwrap();
    *devices.lock().unwrap() = dimm();
    let place = fake.map(&format!("memfd memory-backend-memfd {}", 32 << 20));
    let changes = follower.poll().unwrap();
    assert!(
        matches!(&changes[..], [Change::Came(range)] if range.hva == place && range.block == "m1"),
        "{changes:?}"
    );

    *devices.lock().unwrap() = json!([]);
    fake.tell("unmap");
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Went(range)] if range.hva == place), "{changes:?}");
}

#[test]
fn a_running_migration_turns_everything_off() {
    let name = unique("migrating");
    let mut fake = Fake::start("qemu-system-x86_64", &format!("-name {name} -m 64"));
    fake.tell(&format!("anonymous {MIB_64}"));
    let answers = qemu(&name, json!([]), "postcopy-active");
    let server = Server::start(1, move |stream| serve_qmp(stream, &answers));
    let dossier = inspect(&fake.held(), &with_qmp(&server.socket)).unwrap();
    let migrating = Hazard::Migrating { status: "postcopy-active".to_owned() };
    assert_eq!(dossier.rungs().off(Rung::GuestFree), Some(&migrating));
}

#[test]
fn a_migration_that_has_ended_is_noticed_although_no_mapping_changes() {
    let name = unique("migrated");
    let mut fake = Fake::start("qemu-system-x86_64", &format!("-name {name} -m 64"));
    fake.tell(&format!("anonymous {MIB_64}"));
    let status = Arc::new(Mutex::new("active"));
    let told = Arc::clone(&status);
    // Inspected twice, and not each time it is looked at.
    let server = Server::start(2, move |stream| {
        serve_qmp(stream, &|command| qemu(&name, json!([]), *told.lock().unwrap())(command));
    });
    let mut follower = Follower::new(fake.held(), with_qmp(&server.socket)).unwrap();
    assert!(!follower.dossier().rungs().allows(Rung::GuestFree));
    *status.lock().unwrap() = "completed";
    let deadline = Instant::now() + Duration::from_secs(180);
    while !follower.dossier().rungs().allows(Rung::GuestFree) {
        assert_eq!(follower.poll().unwrap(), []);
        assert!(Instant::now() < deadline, "{}", follower.dossier());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_socket_of_another_machine_is_refused() {
    for (line, said) in [
        ("-name web1 -m 64", "its name is \"web2\", and that of"),
        ("-m 64", "its name is \"web2\", and that of"),
        ("-name web2 -m 128", "its RAM without memory devices is 64M, and that of"),
    ] {
        let fake = Fake::start("qemu-system-x86_64", line);
        let server = Server::start(1, |stream| serve_qmp(stream, &qemu("web2", json!([]), "none")));
        let error = inspect(&fake.held(), &with_qmp(&server.socket)).unwrap_err();
        assert!(matches!(error, Refusal::WrongSocket { .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[test]
fn a_device_that_the_process_has_no_memory_for_is_a_lie() {
    let mut fake = Fake::start("qemu-system-x86_64", "-name web2 -m 64");
    fake.tell(&format!("anonymous {MIB_64}"));
    let server = Server::start(1, |stream| serve_qmp(stream, &qemu("web2", dimm(), "none")));
    let error = inspect(&fake.held(), &with_qmp(&server.socket)).unwrap_err().to_string();
    assert!(error.contains("looked for m1 of 32M"), "{error}");
}

/// Answers requests with those texts, one after the other on each connection, and the last again and again.
fn http(answers: impl Fn(&str) -> String + Send + 'static) -> Server {
    Server::start(1, move |stream| serve_http(stream, &answers))
}

fn serve_http(mut stream: UnixStream, answer: &dyn Fn(&str) -> String) {
    loop {
        let mut request = Vec::new();
        let mut bytes = [0; 512];
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(count) => request.extend_from_slice(&bytes[..count]),
            }
        }
        let text = String::from_utf8(request).unwrap();
        let path = text.split(' ').nth(1).unwrap();
        // The connection stays open, as the VMMs' do; the client may have hung up.
        if stream.write_all(answer(path).as_bytes()).is_err() {
            return;
        }
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn bad() -> String {
    "HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n".to_owned()
}

#[test]
fn a_firecracker_tells_its_size_over_its_own_socket_unasked() {
    let server = http(|path| match path {
        "/machine-config" => ok(r#"{"vcpu_count": 1, "mem_size_mib": 64, "smt": false}"#),
        _ => bad(),
    });
    let mut fake = Fake::start("firecracker", &format!("--id fc --api-sock {}", server.socket.display()));
    let place = fake.map(&format!("anonymous {MIB_64}"));
    fake.tell(&format!("memfd other {}", 32 << 20));
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    assert_eq!(dossier.ram.iter().map(|range| range.hva).collect::<Vec<_>>(), [place]);
    assert!(dossier.notes.is_empty(), "{:?}", dossier.notes);
}

#[test]
fn a_cloud_hypervisor_made_over_its_api_tells_its_memory() {
    let info = json!({ "state": "Running", "config": { "memory": { "size": 0, "zones": [
        { "id": "z0", "size": MIB_64, "shared": true, "host_numa_node": 0 },
        { "id": "z1", "size": 32 << 20, "shared": true },
    ] } } });
    let server = http(move |_| ok(&info.to_string()));
    let mut fake = Fake::start("cloud-hypervisor", &format!("--api-socket {}", server.socket.display()));
    let first = fake.map(&format!("memfd ch_ram {MIB_64}"));
    let second = fake.map(&format!("memfd ch_ram {}", 32 << 20));
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    let found: Vec<_> = dossier.ram.iter().map(|range| (range.block.as_str(), range.hva)).collect();
    assert_eq!((found, dossier.run_state.as_deref()), (vec![("z0", first), ("z1", second)], Some("Running")));
}

#[test]
fn an_api_that_does_not_answer_is_noted_when_nobody_asked_for_it_and_refused_when_somebody_did() {
    for answer in [bad(), ok("{\"mem_size_mib\": \"many\"}"), "garbage\r\n\r\n".to_owned(), String::new()] {
        // With an empty answer the client gives up waiting.
        let served = |answer: &String| {
            let answer = answer.clone();
            http(move |_| answer.clone())
        };
        let server = served(&answer);
        let mut fake = Fake::start("firecracker", &format!("--api-sock {}", server.socket.display()));
        fake.tell(&format!("anonymous {MIB_64}"));
        let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
        assert!(
            matches!(&dossier.notes[..], [Note::NoAnswer { .. }, Note::ByLooks]),
            "{answer}: {:?}",
            dossier.notes
        );

        let server = served(&answer);
        let request = Request { api: Some(server.socket.clone()), ..Request::default() };
        let error = inspect(&fake.held(), &request).unwrap_err();
        assert!(
            matches!(
                error,
                Refusal::Control(
                    ControlError::Refused { .. }
                        | ControlError::Garbage { .. }
                        | ControlError::Stalled { .. }
                )
            ),
            "{error}"
        );
    }
}

/// The ranges of RAM that a machine has now, as the dossier says.
fn ram(follower: &Follower) -> Vec<HvaRange> {
    let mut ram: Vec<HvaRange> = follower.dossier().ram.iter().map(|range| range.hva).collect();
    ram.sort_by_key(|range| range.start());
    ram
}

fn sorted<const N: usize>(mut ranges: [HvaRange; N]) -> [HvaRange; N] {
    ranges.sort_by_key(|range| range.start());
    ranges
}

#[test]
fn memory_that_is_plugged_into_a_cloud_hypervisor_is_found_by_what_its_api_says() {
    let size = Arc::new(Mutex::new(MIB_64));
    let told = Arc::clone(&size);
    let server = Server::start(3, move |stream| {
        serve_http(stream, &|_| {
            let memory = json!({ "size": *told.lock().unwrap(), "shared": true, "hotplug_size": 1 << 30,
                "hotplug_method": "Acpi" });
            ok(&json!({ "state": "Running", "config": { "memory": memory } }).to_string())
        });
    });
    let socket = server.socket.display();
    let line = format!("--api-socket {socket} --memory size=64M,shared=on,hotplug_size=1G");
    let mut fake = Fake::start("cloud-hypervisor", &line);
    let base = fake.map(&format!("memfd ch_ram {MIB_64}"));
    let mut follower = Follower::new(fake.held(), nothing_known()).unwrap();
    assert_eq!(ram(&follower), [base]);

    let plugged = fake.map(&format!("memfd ch_ram {}", 32 << 20));
    *size.lock().unwrap() += 32 << 20;
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Came(range)] if range.hva == plugged), "{changes:?}");
    assert_eq!(ram(&follower), sorted([base, plugged]));

    // A mapping that the machine's size leaves no room for is none of its RAM.
    fake.tell(&format!("memfd other {}", 16 << 20));
    let error = follower.poll().unwrap_err().to_string();
    assert!(error.contains("mem0 of 96M"), "{error}");
    assert_eq!(ram(&follower), sorted([base, plugged]));
}

#[test]
fn memory_that_is_plugged_into_a_cloud_hypervisor_that_does_not_answer_is_found_by_its_mapping() {
    let mut fake = Fake::start("cloud-hypervisor", "--memory size=64M,shared=on,hotplug_size=48M");
    let base = fake.map(&format!("memfd ch_ram {MIB_64}"));
    let mut follower = Follower::new(fake.held(), nothing_known()).unwrap();
    assert_eq!(ram(&follower), [base]);
    let plugged = fake.map(&format!("memfd ch_ram {}", 32 << 20));
    follower.poll().unwrap();
    assert_eq!(ram(&follower), sorted([base, plugged]));
    // More than it may have: what else there is cannot be told from its RAM, which is kept as it was.
    fake.tell(&format!("memfd other {}", 32 << 20));
    follower.poll().unwrap();
    assert!(ram(&follower).contains(&base));
}

#[test]
fn slots_that_are_plugged_into_a_firecracker_are_found_and_those_unplugged_are_not() {
    const SLOT: u64 = 32 << 20;
    let plugged = Arc::new(Mutex::new(0));
    let told = Arc::clone(&plugged);
    let server = Server::start(3, move |stream| {
        serve_http(stream, &|path| match path {
            "/machine-config" => ok(r#"{"vcpu_count": 1, "mem_size_mib": 64}"#),
            "/hotplug/memory" => {
                ok(&json!({ "total_size_mib": 128, "slot_size_mib": 32, "block_size_mib": 2,
                "plugged_size_mib": *told.lock().unwrap(), "requested_size_mib": 128 })
                .to_string())
            }
            _ => bad(),
        });
    });
    let mut fake = Fake::start("firecracker", &format!("--id fc --api-sock {}", server.socket.display()));
    let base = fake.map(&format!("anonymous {MIB_64}"));
    let mut follower = Follower::new(fake.held(), nothing_known()).unwrap();
    assert_eq!(ram(&follower), [base]);

    // The guest uses two blocks of a slot, which is accessible as a whole.
    let slot = fake.map(&format!("anonymous {SLOT}"));
    *plugged.lock().unwrap() = 4;
    follower.poll().unwrap();
    assert_eq!(ram(&follower), sorted([base, slot]));

    fake.tell("unmap");
    *plugged.lock().unwrap() = 0;
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Went(range)] if range.hva == slot), "{changes:?}");
    assert_eq!(ram(&follower), [base]);
}
