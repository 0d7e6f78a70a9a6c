//! crosvm's command line. Its devices run as children with the same arguments; who is the main process is told by
//! parents, elsewhere.

use super::{Address, Backing, Block, Claim, ControlSocket, Note, Protocol, name_from_socket};
use crate::argv::{Options, size};
use plimsoll_types::ByteCount;
use std::path::Path;

/// A bare number after `--mem` counts MiB.
const MIB: ByteCount = ByteCount::mib(1);

pub(super) fn claim(options: &Options<'_>) -> Claim {
    let socket = options.last(&["s", "socket"]);
    let memory = options.properties(&["m", "mem"]).last();
    let size = memory.and_then(|memory| size(memory.first_or("size")?, MIB));
    let vhost_user =
        options.has("vhost-user") || options.has("vhost-user-fs") || options.has("vhost-user-blk");
    let address =
        |path: &str| ControlSocket { protocol: Protocol::Crosvm, address: Address::Path(path.into()) };
    Claim {
        name: options.last(&["name"]).map(str::to_owned).or_else(|| name_from_socket(Path::new(socket?))),
        sockets: socket.map(address).into_iter().collect(),
        blocks: vec![Block { size, backing: Backing::Memfd, ..Block::unsaid("guest") }],
        notes: vhost_user.then_some(Note::VhostUser).into_iter().collect(),
        ..Claim::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_and_socket_are_read_in_every_form() {
        for line in [
            "crosvm run -m 512 -s /run/web1.sock kernel",
            "crosvm run --mem size=512 --socket /run/web1.sock kernel",
            "crosvm run --mem=512 --socket=/run/other.sock --name web1 kernel",
        ] {
            let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let claim = claim(&Options::new(&argv));
            assert_eq!(claim.blocks[0].size, Some(ByteCount::mib(512)), "{line}");
            assert_eq!(claim.name.as_deref(), Some("web1"), "{line}");
        }
    }
}
