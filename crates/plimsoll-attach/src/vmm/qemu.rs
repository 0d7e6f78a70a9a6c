//! QEMU's command line, as people, libvirt and Proxmox write it.
//!
//! Guest RAM is either one block of `-m` bytes, or the memory back ends that `-machine memory-backend=`, `-numa
//! node,memdev=` and memory devices name. Other back ends (of ivshmem, say) are not RAM.

use super::{Address, Backing, Block, Claim, ControlSocket, Note, Origin, Protocol};
use crate::argv::{Options, Properties, size};
use crate::rungs::Hazard;
use plimsoll_types::ByteCount;
use std::path::PathBuf;

/// A bare number after `-m` counts MiB; without `-m` there are 128 of them.
const MIB: ByteCount = ByteCount::mib(1);
const DEFAULT_RAM: ByteCount = ByteCount::mib(128);
/// QEMU rounds `-m` up to this (hw/core/machine.c).
const RAM_GRANULE: u64 = 8192;
const BYTE: ByteCount = ByteCount(1);

pub(super) fn claim(options: &Options<'_>) -> Claim {
    let name =
        options.properties(&["name"]).filter_map(|name| name.first_or("guest").map(str::to_owned)).last();
    let mut claim = Claim { name, uuid: uuid(options), sockets: sockets(options), ..Claim::default() };
    // `-machine none` is how libvirt asks a QEMU what it can do: no machine, no RAM.
    let machine_is_none =
        options.properties(&["machine", "M"]).any(|machine| machine.first_or("type") == Some("none"));
    if !machine_is_none {
        claim.blocks = blocks(options);
    }
    claim.hazards = hazards(options);
    let devices = options.properties(&["device", "netdev"]);
    let mut kinds =
        devices.filter_map(|device| device.first_or("driver").or(device.get("type")).map(str::to_owned));
    if kinds.any(|kind| kind.starts_with("vhost-user")) {
        claim.notes.push(Note::VhostUser);
    }
    if options.properties(&["m"]).any(|memory| memory.get("maxmem").is_some()) {
        claim.notes.push(Note::HotPlug);
    }
    claim
}

/// `-uuid`, or where Proxmox puts it, `-smbios type=1,uuid=`.
fn uuid(options: &Options<'_>) -> Option<String> {
    let in_tables = || {
        let tables = options.properties(&["smbios"]).filter(|table| table.get("type") == Some("1"));
        tables.filter_map(|table| table.get("uuid").map(str::to_owned)).last()
    };
    options.last(&["uuid"]).map(str::to_owned).or_else(in_tables)
}

/// `-qmp unix:PATH,server`, and `-mon chardev=ID,mode=control` over `-chardev socket,id=ID,…`. A socket on which QEMU is
/// the client leads to somebody else.
fn sockets(options: &Options<'_>) -> Vec<ControlSocket> {
    let qmp = |address| ControlSocket { protocol: Protocol::Qmp, address };
    let short = options.all(&["qmp", "qmp-pretty"]).filter_map(|text| {
        let properties = Properties::new(text.strip_prefix("unix:")?);
        is_server(&properties)
            .then(|| properties.first_or("path").map(|path| qmp(Address::Path(path.into()))))?
    });
    let chardevs: Vec<Properties> = options.properties(&["chardev"]).collect();
    let monitors = options.properties(&["mon"]).filter(|monitor| monitor.get("mode") == Some("control"));
    let long = monitors.filter_map(|monitor| {
        let id = monitor.first_or("chardev")?;
        let chardev = chardevs.iter().find(|chardev| chardev.get("id") == Some(id) && is_server(chardev))?;
        let inherited = || Some(Address::Inherited { descriptor: chardev.get("fd")?.parse().ok()? });
        let path = chardev.get("path").map(|path| Address::Path(PathBuf::from(path)));
        path.or_else(inherited).map(qmp)
    });
    short.chain(long).collect()
}

fn is_server(socket: &Properties) -> bool {
    socket.is_on("server")
}

fn blocks(options: &Options<'_>) -> Vec<Block> {
    let objects: Vec<Properties> = options.properties(&["object"]).collect();
    let backend = |id: &str, origin| objects.iter().find_map(|object| block(object, id, origin));
    let named = |names: &'static [&'static str], key: &'static str| {
        let values =
            options.properties(names).filter_map(move |properties| properties.get(key).map(str::to_owned));
        values.collect::<Vec<_>>()
    };
    let mut blocks: Vec<Block> = named(&["machine", "M"], "memory-backend")
        .iter()
        .chain(&named(&["numa"], "memdev"))
        .filter_map(|id| backend(id, Origin::Base))
        .collect();
    if blocks.is_empty() {
        blocks.extend(plain_block(options));
    }
    blocks.extend(named(&["device"], "memdev").iter().filter_map(|id| {
        // ivshmem's memory is shared between machines, and not the guest's.
        let of_ram = |device: &Properties| {
            let driver = device.first_or("driver").unwrap_or_default();
            device.get("memdev") == Some(id) && !driver.starts_with("ivshmem")
        };
        options.properties(&["device"]).any(|device| of_ram(&device)).then(|| backend(id, Origin::Device))?
    }));
    blocks
}

/// The block of `-m`, without a back end of its own.
fn plain_block(options: &Options<'_>) -> Option<Block> {
    // QEMU merges what several `-m` say.
    let sizes = options.properties(&["m"]).filter_map(|memory| memory.first_or("size").map(str::to_owned));
    let given = sizes.last().and_then(|text| size(&text, MIB));
    let size = ByteCount(given.unwrap_or(DEFAULT_RAM).0.checked_next_multiple_of(RAM_GRANULE)?);
    let backing = options.last(&["mem-path"]).map_or(Backing::Anonymous, |path| Backing::File(path.into()));
    Some(Block { size: Some(size), backing, ..Block::unsaid("ram") })
}

/// The memory back end of that id, if the object is it.
fn block(object: &Properties, id: &str, origin: Origin) -> Option<Block> {
    if object.get("id") != Some(id) {
        return None;
    }
    let backing = match object.first_or("qom-type")? {
        "memory-backend-ram" if object.is_on("share") => Backing::Unsaid,
        "memory-backend-ram" => Backing::Anonymous,
        "memory-backend-memfd" => Backing::Memfd,
        "memory-backend-file" => Backing::File(object.get("mem-path")?.into()),
        kind if kind.starts_with("memory-backend") => Backing::Unsaid,
        _ => return None,
    };
    let node = object.get("host-nodes").and_then(|nodes| nodes.split(['-', ':']).next()?.parse().ok());
    Some(Block { size: object.size("size", BYTE), node, backing, origin, ..Block::unsaid(id) })
}

fn hazards(options: &Options<'_>) -> Vec<Hazard> {
    let secret = options.properties(&["object"]).find_map(|object| {
        let kind = object.first_or("qom-type")?;
        ["sev-guest", "sev-snp-guest", "tdx-guest", "s390-pv-guest"]
            .contains(&kind)
            .then(|| format!("-object {kind}"))
    });
    let supported = || {
        let mut machines = options.properties(&["machine", "M"]);
        machines.find_map(|machine| machine.get("confidential-guest-support").map(str::to_owned))
    };
    let evidence = secret.or_else(|| supported().map(|id| format!("confidential-guest-support={id}")));
    evidence.map(|evidence| Hazard::Confidential { evidence }).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    fn of(line: &str) -> Claim {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        claim(&Options::new(&argv))
    }

    fn sizes(claim: &Claim) -> Vec<(&str, u64)> {
        claim
            .blocks
            .iter()
            .map(|block| (block.name.as_str(), block.size.map_or(0, |size| size.0 >> 20)))
            .collect()
    }

    #[test]
    fn a_plain_machine_has_one_block_of_its_size() {
        for (line, mib) in [
            ("qemu", 128),
            ("qemu -m 512", 512),
            ("qemu -m 1.5G", 1536),
            ("qemu -m 192M -m slots=2,maxmem=1G", 192),
            ("qemu -m 192M -m 256M", 256),
            ("qemu -m size=512M,slots=4,maxmem=2G", 512),
            ("qemu -m size=2097152k", 2048),
            ("qemu -m 512 -object memory-backend-ram,id=spare,size=64M", 512),
        ] {
            assert_eq!(sizes(&of(line)), [("ram", mib)], "{line}");
        }
        assert_eq!(
            of("qemu -m 64 -mem-path /dev/hugepages").blocks[0].backing,
            Backing::File("/dev/hugepages".into())
        );
        assert!(of("qemu -m maxmem=2G,size=1G").notes.contains(&Note::HotPlug));
    }

    #[test]
    fn a_numa_machine_has_the_blocks_of_its_nodes() {
        let claim = of("qemu -m 192 -object memory-backend-ram,id=a,size=64M,host-nodes=1,policy=bind \
            -object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"b\",\"size\":134217728,\"share\":true,\"host-nodes\":[0]} \
            -numa node,nodeid=0,memdev=a -numa node,nodeid=1,memdev=b");
        assert_eq!(sizes(&claim), [("a", 64), ("b", 128)]);
        assert_eq!(claim.blocks.iter().map(|block| block.node).collect::<Vec<_>>(), [Some(1), Some(0)]);
        assert_eq!(
            (&claim.blocks[0].backing, &claim.blocks[1].backing),
            (&Backing::Anonymous, &Backing::Memfd)
        );
    }

    #[test]
    fn memory_devices_bring_blocks_and_ivshmem_does_not() {
        let claim = of(
            "qemu -m 64 -object memory-backend-ram,id=d,size=32M -object memory-backend-file,id=i,size=1M,mem-path=/x \
            -device pc-dimm,id=dimm0,memdev=d -device ivshmem-plain,memdev=i",
        );
        assert_eq!(sizes(&claim), [("ram", 64), ("d", 32)]);
        assert_eq!(claim.blocks[1].origin, Origin::Device);
    }

    #[test]
    fn only_sockets_on_which_qemu_listens_are_control_sockets() {
        let claim = of(
            "kvm -chardev socket,id=qmp,path=/run/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
            -chardev socket,id=ev,path=/run/ev.sock,reconnect=5 -mon chardev=ev,mode=control \
            -chardev socket,id=hmp,path=/run/hmp,server -mon chardev=hmp,mode=readline \
            -chardev socket,id=charmonitor,fd=22,server=on -mon chardev=charmonitor,mode=control \
            -qmp unix:/run/old.qmp,server,nowait -qmp tcp:localhost:4444,server -qmp unix:/run/peer",
        );
        let shown: Vec<String> = claim.sockets.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["QMP at /run/old.qmp", "QMP at /run/100.qmp", "QMP on descriptor 22, owned by libvirt"]
        );
    }

    /// As libvirt 9 starts QEMU 7.2, devices left out.
    const LIBVIRT: &str = r#"/usr/bin/qemu-system-x86_64 -name guest=f36,debug-threads=on -S
        -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-f36/master-key.aes"}
        -machine pc-i440fx-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm -cpu host,migratable=on
        -m size=2097152k -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648} -overcommit mem-lock=off
        -smp 2,sockets=2,cores=1,threads=1 -uuid 712590b2-fbd8-4a2f-a8e9-be33cb9ee0da -display none -no-user-config -nodefaults
        -chardev socket,id=charmonitor,fd=39,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
        -rtc base=utc,driftfix=slew -boot strict=on
        -netdev {"type":"vhost-user","chardev":"charnet0","id":"hostnet0"}
        -device {"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.0","addr":"0x3"} -msg timestamp=on"#;

    /// As Proxmox VE 8 starts it, devices left out.
    const PROXMOX: &str = "/usr/bin/kvm -id 100 -name web1,debug-threads=on -no-shutdown
        -chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control
        -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5 -mon chardev=qmp-event,mode=control
        -pidfile /var/run/qemu-server/100.pid -daemonize -smbios type=1,uuid=b77a12f3-0292-4197-a692-246fd9ba4caf
        -smp 16,sockets=1,cores=16,maxcpus=16 -nodefaults -vnc unix:/var/run/qemu-server/100.vnc,password=on
        -cpu qemu64,+aes,enforce -m 13312 -object memory-backend-ram,size=13312M,id=ram-node0
        -numa node,nodeid=0,cpus=0-15,memdev=ram-node0 -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3";

    fn written_by(manager: &str) -> Claim {
        let argv: Vec<String> = manager.split_ascii_whitespace().map(str::to_owned).collect();
        claim(&Options::new(&argv))
    }

    #[test]
    fn libvirts_command_line_is_understood() {
        let claim = written_by(LIBVIRT);
        assert_eq!(claim.name.as_deref(), Some("f36"));
        assert_eq!(claim.uuid.as_deref(), Some("712590b2-fbd8-4a2f-a8e9-be33cb9ee0da"));
        assert_eq!(sizes(&claim), [("pc.ram", 2048)]);
        assert_eq!(claim.sockets[0].to_string(), "QMP on descriptor 39, owned by libvirt");
        assert_eq!((claim.hazards.len(), &claim.notes[..]), (0, &[Note::VhostUser][..]));
    }

    #[test]
    fn proxmoxs_command_line_is_understood() {
        let claim = written_by(PROXMOX);
        assert_eq!(claim.name.as_deref(), Some("web1"));
        assert_eq!(claim.uuid.as_deref(), Some("b77a12f3-0292-4197-a692-246fd9ba4caf"));
        assert_eq!(sizes(&claim), [("ram-node0", 13312)]);
        assert_eq!(claim.sockets.len(), 1);
        assert_eq!(claim.sockets[0].to_string(), "QMP at /var/run/qemu-server/100.qmp");
    }

    #[test]
    fn protected_guests_are_noticed() {
        let evidence = |line| of(line).hazards.iter().map(ToString::to_string).collect::<String>();
        assert!(evidence("qemu -object sev-snp-guest,id=s").contains("-object sev-snp-guest"));
        assert!(evidence("qemu -machine q35,confidential-guest-support=lsec0").contains("=lsec0"));
        assert_eq!(evidence("qemu -object rng-random,id=r"), "");
    }

    #[test]
    fn asking_a_qemu_what_it_can_do_is_no_machine() {
        assert!(
            of("qemu -S -no-user-config -nodefaults -machine none,accel=kvm:tcg -qmp unix:/x,server")
                .blocks
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn any_command_line_is_read_without_a_panic(argv in any::<Vec<String>>(), pick in "-(m|object|numa|device|mon|chardev|qmp|name) [ -~]{0,60}") {
            let line: Vec<String> = argv.into_iter().chain(pick.split(' ').map(str::to_owned)).collect();
            claim(&Options::new(&line));
        }
    }
}
