//! What must hold of every parser that faces a guest, a VMM or a client, whatever it is given.
//!
//! Enters: bytes. Leaves: whether they were accepted. What must never happen is each body's own business, and a panic: believing what
//! the bytes do not say, giving back other bytes than were put in, taking more steps than there are things to step over. A body is
//! an ordinary function, and there is one list of them, [`TARGETS`]: the seeded tests (`tests/parsers.rs`), libFuzzer (`fuzz/`) and
//! the program of this package, which needs neither a nightly compiler nor coverage, all run these.
#![expect(clippy::unwrap_used, reason = "examples are made of what is right")]

mod bodies;
pub mod mutate;

use bodies::{disk, frames, http, keeper, monitor, notes, records, settings, tables, walks, wire, words};

/// A parser, or several that face the same side.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Who may have written what it reads.
    pub faces: &'static str,
    /// Reads the bytes, and says whether they were accepted.
    ///
    /// # Panics
    /// Something that must hold does not.
    pub body: fn(&[u8]) -> bool,
    /// What is right, from which other inputs are made. Each is accepted.
    pub examples: fn() -> Vec<Vec<u8>>,
}

/// Every parser.
pub const TARGETS: [Target; 15] = [
    Target {
        name: "handover",
        faces: "a VMM, by the hand-over protocol; a manager, to an agent",
        body: wire::read,
        examples: wire::examples,
    },
    Target {
        name: "keeper",
        faces: "a manager, to its keeper",
        body: keeper::read,
        examples: keeper::examples,
    },
    Target { name: "settings", faces: "an operator's file", body: settings::file, examples: settings::files },
    Target {
        name: "requests",
        faces: "a client: bodies of the API's requests and answers, and the control socket's",
        body: settings::request,
        examples: settings::requests,
    },
    Target {
        name: "prints",
        faces: "QEMU's monitor and /proc: text for people",
        body: monitor::prints,
        examples: monitor::texts,
    },
    Target {
        name: "qmp",
        faces: "QEMU, or what listens in its place",
        body: monitor::qmp,
        examples: monitor::qmp_examples,
    },
    Target {
        name: "rest",
        faces: "Firecracker and Cloud Hypervisor, or what listens in their place",
        body: monitor::rest,
        examples: monitor::rest_examples,
    },
    Target {
        name: "records",
        faces: "whoever wrote a record",
        body: records::read,
        examples: records::examples,
    },
    Target {
        name: "disk",
        faces: "whoever can write to the disk tier",
        body: disk::read,
        examples: disk::examples,
    },
    Target {
        name: "words",
        faces: "memory that outlived a manager",
        body: words::read,
        examples: words::examples,
    },
    Target {
        name: "walks",
        faces: "a guest, by its page tables",
        body: walks::read,
        examples: walks::examples,
    },
    Target {
        name: "tables",
        faces: "a guest, by its page tables, all of them",
        body: tables::read,
        examples: tables::examples,
    },
    Target {
        name: "frames",
        faces: "a guest, by the memory that it shares with its host",
        body: frames::read,
        examples: frames::examples,
    },
    Target {
        name: "http",
        faces: "a client of the API, byte by byte",
        body: http::read,
        examples: http::examples,
    },
    Target {
        name: "notes",
        faces: "whoever wrote a dump: the note of its pages' states",
        body: notes::read,
        examples: notes::examples,
    },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
