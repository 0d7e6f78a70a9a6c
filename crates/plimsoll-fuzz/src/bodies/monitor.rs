//! What is read of a VMM from outside: text that QEMU's monitor and the kernel print, and answers on its sockets. A peer that has said
//! what it says and hangs up keeps nobody waiting, and what it said is shown on one line, in part.
use super::text;
use plimsoll_attach::control::{CloudHypervisor, Control, Firecracker};
use plimsoll_attach::parse_range;
use plimsoll_attach::qmp::{
    GENERAL, Limits, Qmp, SEGMENTS, parse_flat_view, parse_ram_blocks, parse_registers,
};
use plimsoll_sys::procfs::{parse_smaps_rollup, parse_status};
use serde_json::Value;
use std::cell::RefCell;
use std::fmt::Display;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Nobody waits longer for a peer; it hangs up long before.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than any error's text: what was found is quoted, and cut off.
const SAID_MAX: usize = 2000;

/// Reads bytes as each text.
pub(crate) fn prints(bytes: &[u8]) -> bool {
    let text = text(bytes);
    let lines = text.lines().count();
    let blocks = parse_ram_blocks(&text);
    assert!(blocks.as_ref().is_none_or(|blocks| blocks.len() <= lines));
    let view = parse_flat_view(&text);
    assert!(view.as_ref().is_none_or(|ranges| ranges.len() <= lines));
    let registers = parse_registers(&text);
    let range = parse_range(&text);
    assert!(range.as_ref().is_ok_and(|range| range.len().0 > 0) || range.is_err());
    blocks.is_some()
        || view.is_some()
        || registers.is_some()
        || range.is_ok()
        || parse_smaps_rollup(&text).is_ok()
        || parse_status(&text).is_ok()
}

pub(crate) fn texts() -> Vec<Vec<u8>> {
    let blocks = "              Block Name    PSize              Offset               Used              Total\n\
                  \x20                pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000\n";
    let view = "FlatView #1\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n  \
                0000000000000000-00000000000bffff (prio 0, ram): pc.ram\r\n  \
                00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000\r\n";
    let mut registers = String::new();
    for name in GENERAL.iter().chain(&["RIP", "RFL", "CR0", "CR2", "CR3", "CR4", "EFER"]) {
        registers += &format!("{name:<3}=0000000000000010 ");
    }
    registers += "CPL=0\n";
    for name in SEGMENTS {
        registers += &format!("{name:<3}=0010 0000000000000000 ffffffff 00a09b00\n");
    }
    registers += "GDT=     fffffe0000001000 0000007f\nIDT=     fffffe0000000000 00000fff\n";
    let own = |name| std::fs::read(format!("/proc/self/{name}")).unwrap();
    vec![
        blocks.into(),
        view.into(),
        registers.into(),
        "7f0000000000-7f0000001000".into(),
        own("smaps_rollup"),
        own("status"),
    ]
}

/// A peer on a socket of this thread's own, which says one thing to whoever connects, and hangs up.
struct Peer {
    path: PathBuf,
    says: Arc<Mutex<Vec<u8>>>,
}

impl Peer {
    fn start() -> Self {
        let name = format!("plimsoll-peer-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let (listener, says) = (UnixListener::bind(&path).unwrap(), Arc::new(Mutex::new(Vec::new())));
        let peer = Self { path, says: Arc::clone(&says) };
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let bytes = says.lock().unwrap().clone();
                // Whoever connects may hang up first, and need not listen to all of it.
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        peer
    }

    /// Has `ask` speak to a peer that says `bytes`.
    fn saying<T>(bytes: &[u8], ask: impl FnOnce(&Path) -> T) -> T {
        thread_local! {
            static PEER: RefCell<Option<Peer>> = const { RefCell::new(None) };
        }
        PEER.with_borrow_mut(|peer| {
            let peer = peer.get_or_insert_with(Self::start);
            *peer.says.lock().unwrap() = bytes.to_vec();
            let begun = Instant::now();
            let answer = ask(&peer.path);
            assert!(begun.elapsed() < PATIENCE, "a peer that has hung up was waited for");
            answer
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Has a client of QMP read bytes as all that its peer says.
pub(crate) fn qmp(bytes: &[u8]) -> bool {
    let limits = Limits { connect: PATIENCE, reply: PATIENCE, line: 4096 };
    let answer = Peer::saying(bytes, |path| {
        let mut client = Qmp::connect(path, limits)?;
        client.execute("query-status", Value::Null)
    });
    // Nothing is believed that no line says.
    if let Ok(value) = &answer {
        assert!(text(bytes).lines().any(|line| {
            let line: Result<Value, _> = serde_json::from_str(line);
            line.is_ok_and(|line| line.get("return") == Some(value))
        }));
    }
    is_told(&answer)
}

/// Whether there was an answer; why there was none is said on one line, in part.
fn is_told<T, E: Display>(answer: &Result<T, E>) -> bool {
    if let Err(error) = answer {
        let said = error.to_string();
        assert!(said.len() < SAID_MAX && !said.contains('\n'), "{said:?}");
    }
    answer.is_ok()
}

pub(crate) fn qmp_examples() -> Vec<Vec<u8>> {
    let plain = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n{\"return\": {}, \"id\": 0}\r\n\
                 {\"event\": \"STOP\", \"data\": {}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n\
                 {\"return\": {\"status\": \"running\", \"running\": true}, \"id\": 1}\r\n";
    vec![plain.into()]
}

/// Has clients of both VMMs read bytes as an answer.
pub(crate) fn rest(bytes: &[u8]) -> bool {
    let firecracker = Peer::saying(bytes, |path| Firecracker::new(path, PATIENCE).run_state().map(drop));
    let cloud = Peer::saying(bytes, |path| CloudHypervisor::new(path, PATIENCE).run_state().map(drop));
    is_told(&firecracker) | is_told(&cloud)
}

pub(crate) fn rest_examples() -> Vec<Vec<u8>> {
    let answer = |body: &str| {
        let head = "HTTP/1.1 200 OK\r\nServer: Firecracker API\r\nContent-Type: application/json\r\n";
        format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let chunked = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    let state =
        r#"{"config":{"memory":{"size":1073741824}},"state":"Running","memory_actual_size":1073741824}"#;
    let pieces = format!("{chunked}{:x}\r\n{state}\r\n0\r\n\r\n", state.len());
    vec![answer(state), pieces.into_bytes()]
}
