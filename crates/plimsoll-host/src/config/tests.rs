//! Settings files that are understood, and the sentence for each that is not.
use super::*;
use plimsoll_policy::costs::Losses;
use plimsoll_policy::settings::{BUFFER_USUAL, Terms};
use plimsoll_types::DomainId;

fn refusal(text: &str) -> String {
    Config::parse(text, "host.toml").expect_err(text).to_string()
}

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

#[test]
fn both_faces_and_groups_are_understood() {
    let text = r#"
        [host]
        memory = "4G"
        reserve = "256M"
        idle-tax = "50 %"
        storing-share = "250%"
        [group.tenant]
        reservation = "1G"
        sharing = true
        [group.inner]
        group = "tenant"
        limit = "2G"
        [machine.web]
        group = "inner"
        reservation = "512M"
        shares = 10000
        highest = "never-page"
        stall-objective = "0.25%"
        qmp = "/run/web.qmp"
        [machine.db]
        minimum = "256M"
        maximum = "4G"
        startup = "1G"
        [machine.rt]
        kind = "dedicated"
    "#;
    let config = Config::parse(text, "host.toml").unwrap();
    assert_eq!((config.memory, config.reserve), (Some(MIB(4096)), MIB(256)));
    assert_eq!((config.tax.rate(), config.storing_share), (Ppm::percent(50), Ppm::percent(250)));
    assert_eq!(Config::default().storing_share, Ppm::percent(100));
    let (tenant, inner) = (config.groups["tenant"], config.groups["inner"]);
    assert_eq!(tenant.domain, Some(DomainId(tenant.id.0)));
    assert_eq!((inner.parent, inner.domain, inner.limit), (Some(tenant.id), None, Some(MIB(2048))));
    let web = config.machine("web").settings(MachineId(7), MIB(1024));
    assert_eq!((web.id, web.parent, web.highest), (MachineId(7), Some(inner.id), Rung::Sharing));
    assert_eq!(web.stall_objective, Ppm(2_500));
    let shares = Shares(10_000);
    let (size, reservation, limit) = (MIB(1024), MIB(512), MIB(1024));
    assert_eq!(web.face, Face::Guarantee { size, reservation, limit, shares });
    let (startup, minimum, maximum) = (MIB(1024), MIB(256), MIB(4096));
    let db = config.machine("db").settings(MachineId(8), MIB(9));
    assert_eq!(db.face, Face::Dynamic { startup, minimum, maximum, buffer: BUFFER_USUAL, weight: 5000 });
    let rt = config.machine("rt").settings(MachineId(9), MIB(64));
    assert_eq!(rt.face, Face::Dedicated { size: MIB(64) });
    let unknown = config.machine("nobody").settings(MachineId(9), MIB(64));
    assert_eq!(Terms::of(&unknown).unwrap().floor.0, 0);
}

#[test]
fn who_may_ask_is_said_whole_or_not_at_all() {
    let all = "[api]\ngroup = \"wheel\"\nlisten = \"[::]:9753\"\ncertificate = \"a.pem\"\nkey = \"/k/a.key\"\nclient-ca = \"ca.pem\"\nmay-read = [\"*\"]\n";
    let api = Config::parse(all, "/etc/plimsoll/plimsoll.toml").unwrap().api;
    assert_eq!(api.group, Some(("wheel".to_owned(), Role::Read)));
    let remote = api.remote.unwrap();
    assert_eq!(remote.listen, "[::]:9753".parse().unwrap());
    assert_eq!([&remote.certificate, &remote.key], ["/etc/plimsoll/a.pem", "/k/a.key"].map(Path::new));
    assert_eq!((remote.may_change, remote.may_read), (vec![], vec![Pattern::new("*")]));
    assert_eq!(Config::parse("", "host.toml").unwrap().api, ApiConfig::default());
    for (key, expected) in [
        ("listen", "host.toml:3: there is certificate and no listen"),
        ("certificate", "host.toml:3: there is listen and no certificate"),
        ("key", "no key: add it, or leave listen out"),
        ("client-ca", "no client-ca"),
        ("may-read", "no may-change or may-read"),
    ] {
        let without = all.lines().filter(|line| !line.starts_with(key)).collect::<Vec<_>>().join("\n");
        assert!(refusal(&without).contains(expected), "{}", refusal(&without));
    }
    for (text, expected) in [
        ("group-may = \"change\"", "there is group-may and no group"),
        ("group = \"a\"\ngroup-may = \"write\"", "write one of \"read\", \"change\""),
        ("listen = \"localhost\"", "write an address and a port in quotes"),
        ("may-read = \"*\"", "write a list of patterns"),
        ("may-read = [1]", "write a list of patterns"),
        ("may-read = [\"\"]", "write a list of patterns"),
        ("token = \"x\"", "unknown key `token`"),
    ] {
        let said = refusal(&format!("[api]\n{text}\n"));
        assert!(said.contains(expected), "{text}: {said}");
    }
}

#[test]
fn each_mistake_is_told_with_its_line_and_what_to_do() {
    let expected = [
        (
            "[machine.web]\nminimum = \"2G\"\nmaximum = \"1G\"\n",
            "host.toml:2: web has a minimum of 2G, more than its maximum of 1G: exchange them",
        ),
        (
            "[host]\nmemory = \"1G\"\nreserve = \"256M\"\n[machine.a]\nreservation = \"512M\"\n[machine.b]\nreservation = \"512M\"\n",
            "host.toml:2: the host has 768M for machines, but 1G is reserved: lower a reservation",
        ),
        ("[group.t]\nshares = 0\n", "host.toml:2: t has 0 shares: give it at least 1"),
        ("\n[machine.web]\nshares = 0\n", "host.toml:3: web has 0 shares: give it at least 1"),
        (
            "[machine.web]\nreservaton = \"1G\"\n",
            "host.toml:2: unknown key `reservaton`: use one of `group`, `kind`, `reservation`, `limit`, `shares`, `startup`, \
          `minimum`, `maximum`, `buffer`, `weight`, `highest`, `stall-objective`, `size`, `qmp`, `api`",
        ),
        (
            "[machine.web]\nlimit = \"1Q\"\n",
            "host.toml:2: limit = \"1Q\": unknown size suffix: use K, M, G or T (powers of 1024)",
        ),
        (
            "[machine.web]\nlimit = 512\n",
            "host.toml:2: limit = 512: write a size in quotes, such as \"512M\" (K, M, G, T: powers of 1024)",
        ),
        (
            "[machine.web]\nstall-objective = nan\n",
            "host.toml:2: stall-objective = nan: write a percentage in quotes, such as \"20%\" or \"0.1%\"",
        ),
        (
            "[machine.web]\nstall-objective = \"-1%\"\n",
            "host.toml:2: stall-objective = \"-1%\": not a percentage: write it as \"20%\" or \"0.1%\"",
        ),
        (
            "[group.a]\ngroup = \"b\"\n\n[group.b]\ngroup = \"a\"\n",
            "host.toml:2: a is nested in b, which is nested in a: leave out one of the two",
        ),
        (
            "[group.a]\n[machine.web]\ngroup = \"x\"\n",
            "host.toml:3: web belongs to the group \"x\", which is not there: add [group.x], or use one of a",
        ),
        (
            "[machine.web]\nminimum = \"1G\"\nmaximum = \"2G\"\nshares = 5\n",
            "host.toml:4: web has minimum, and shares of another face: use reservation, limit and shares, or startup, \
          minimum, maximum, buffer and weight",
        ),
        (
            "[machine.web]\nweight = 100\nminimum = \"1G\"\n",
            "host.toml:3: web has minimum and no maximum: add it",
        ),
        (
            "[machine.web]\nreservation = \"2G\"\nlimit = \"1G\"\n",
            "host.toml:2: web reserves 2G, more than its limit of 1G: lower one or raise the other",
        ),
        (
            "[group.t]\nreservation = \"1G\"\n[machine.web]\ngroup = \"t\"\nreservation = \"2G\"\n",
            "host.toml:2: t reserves 1G, but what is nested in it reserves 2G: raise the one or lower the other",
        ),
        (
            "[host]\nmemory = \"1G\"\nreserve = \"1G\"\n",
            "host.toml:2: the host has 1G, of which 1G are reserved: leave something for machines",
        ),
        (
            "[machine.web]\nlimit = \"1000001\"\n",
            "host.toml:2: web has a limit of 1000001 bytes: use a multiple of 4096",
        ),
        ("[machine.web\n", "host.toml:1: unclosed table, expected `]`"),
    ];
    for (text, sentence) in expected {
        assert_eq!(refusal(text), sentence, "{text}");
    }
    let tax = refusal("[host]\nidle-tax = \"100%\"\n");
    assert!(tax.starts_with("host.toml:2: ") && tax.contains("99 %"), "{tax}");
}

#[test]
fn costs_are_read_from_the_file_beside_the_settings_and_a_wrong_one_is_told_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let (settings, costs) = (folder.path().join("host.toml"), folder.path().join("costs.json"));
    std::fs::write(&settings, "[host]\nmemory = \"4G\"\ncosts = \"costs.json\"\n").unwrap();
    let missing = Config::read(&settings).unwrap_err().to_string();
    let expected = format!("{}:3: the costs {costs:?} cannot be read (", settings.display());
    assert!(missing.starts_with(&expected) && missing.contains("cargo xtask bench cost"), "{missing}");

    let compress = "\"compress\": {\"take_ns\": 9000, \"idle_ppm\": [1, 2, 3, 4, 5, 6]}";
    std::fs::write(&costs, format!("{{\"source\": \"mine\", {compress}}}")).unwrap();
    let read = Config::read(&settings).unwrap().settings(MIB(4096)).costs;
    let usual = Costs::MEASURED;
    let (cost, before) = (read.of(Rung::Compress), usual.of(Rung::Compress));
    assert_eq!((cost.take_ns, cost.back_ns, cost.busy), (9000, before.back_ns, before.busy));
    assert_eq!(cost.idle, Some(Losses([1, 2, 3, 4, 5, 6].map(Ppm))));
    assert_eq!(read.of(Rung::Balloon), usual.of(Rung::Balloon));

    let refused = |text: &str| {
        std::fs::write(&costs, text).unwrap();
        let error = Config::read(&settings).unwrap_err().to_string();
        error.strip_prefix(&format!("{}:", costs.display())).unwrap_or(&error).to_owned()
    };
    for (text, sentence) in [
        (
            "{\"source\": \"mine\",\n\"zswap\": {}}",
            "2: unknown key `zswap`: use one of `source`, `guest-free`, `balloon`, `sharing`, `compress`, `disk`",
        ),
        (
            "{\"source\": \"mine\",\n\n\"balloon\": {\"busy_ppm\": [0, 0]}}",
            "3: 2 losses: give 6, for 10, 20, 30, 40, 50 and 60 % taken",
        ),
        ("{\"source\": \"mine\"", "1: EOF while parsing an object"),
    ] {
        assert_eq!(refused(text), sentence);
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::read("/no/such/host.toml".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "the settings \"/no/such/host.toml\" cannot be read");
}

#[test]
fn what_is_no_file_or_too_large_is_refused_without_waiting_for_it() {
    for (path, why) in [("/dev/zero", "it is no file"), ("/proc", "it is no file")] {
        let error = plimsoll_linux::explain(&Config::read(path.as_ref()).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("host.toml");
    std::fs::File::create(&large).unwrap().set_len(5 << 20).unwrap();
    let error = plimsoll_linux::explain(&Config::read(&large).unwrap_err());
    assert!(error.contains("it is larger than 4M"), "{error}");
}

/// Everything a value may be that it should not be.
const WRONG: [&str; 9] = [
    "-1",
    "4294967296",
    "1.5",
    "\"\"",
    "\"x\\u0000y\"",
    "[]",
    "{}",
    "1979-05-27",
    "\"99999999999999999999T\"",
];
/// What may be said of each kind.
fn right(kind: read::Kind) -> &'static str {
    use read::Kind as K;
    match kind {
        K::Size => "\"4M\"",
        K::Part => "\"20%\"",
        K::Count => "7",
        K::Flag => "true",
        K::Text => "\"t\"",
        K::Pattern => "\"*\"",
        K::Socket | K::File => "\"/dev/null\"",
        K::Patterns => "[\"*\"]",
        K::Address => "\"[::1]:1\"",
        K::OneOf(words) => Box::leak(format!("{:?}", words[0]).into_boxed_str()),
    }
}

/// Each section with how a table of it begins, and each key of it.
fn every_key() -> impl Iterator<Item = (&'static str, &'static keys::Key)> {
    let headings = ["[host]", "[group.g]", "[machine.m]", "[[rule]]", "[api]"];
    headings
        .into_iter()
        .zip(keys::SECTIONS)
        .flat_map(|(heading, section)| section.keys().map(move |key| (heading, key)))
}

#[test]
fn every_key_refuses_every_wrong_value_on_its_line_in_one_sentence_that_names_it() {
    for (heading, key) in every_key() {
        for wrong in WRONG {
            let is_text = matches!(key.kind, read::Kind::Text | read::Kind::Pattern | read::Kind::File);
            if is_text && wrong.starts_with('"') && wrong != "\"\"" {
                continue;
            }
            let text = format!("# a line\n{heading}\n{} = {wrong}\n", key.name);
            let mistakes = Config::parse(&text, "host.toml").expect_err(&text);
            let of_key: Vec<String> = mistakes
                .each()
                .map(ToString::to_string)
                .filter(|one| one.starts_with(&format!("host.toml:3: {} = ", key.name)))
                .collect();
            assert!(
                matches!(&*of_key, [one] if one.lines().count() == 1 && one.contains(": ")),
                "{text}: {mistakes:?}"
            );
        }
    }
}

/// What has to be said beside a key for clients elsewhere.
fn remote_but(key: &str) -> String {
    let others = ["listen", "certificate", "key", "client-ca", "may-change", "may-read"];
    let others = keys::API.keys().filter(|other| others.contains(&other.name) && other.name != key);
    others.map(|other| format!("{} = {}\n", other.name, right(other.kind))).collect()
}

#[test]
fn every_key_that_is_described_is_understood_and_changes_something() {
    let mut rules = 0;
    for (heading, key) in every_key() {
        // Some say something only beside others.
        let beside = match (heading, key.name) {
            ("[machine.m]" | "[[rule]]", "startup" | "buffer" | "weight") => {
                "minimum = \"2M\"\nmaximum = \"8M\"\n"
            }
            ("[machine.m]" | "[[rule]]", "minimum") => "maximum = \"8M\"\n",
            ("[machine.m]" | "[[rule]]", "maximum") => "minimum = \"2M\"\n",
            ("[host]", "reserve") => "memory = \"1G\"\n",
            ("[api]", "group-may") => "group = \"t\"\n",
            ("[api]", name) if name != "group" => &remote_but(name),
            _ => "",
        };
        let condition = if heading == "[[rule]]" && key.name != "name" { "name = \"x\"\n" } else { "" };
        let value = match key.name {
            "costs" => "\"/no/such\"",
            "startup" => "\"4M\"",
            "buffer" => "\"30%\"",
            "idle-tax" => "\"50%\"",
            // True is usual, and so is reading.
            "attach" => "false",
            "group-may" => "\"change\"",
            _ => right(key.kind),
        };
        let read = |line: &str| {
            let said = format!("[group.t]\n{heading}\n{condition}{beside}{line}\n");
            Config::parse(&said, "host.toml").map_err(|mistakes| mistakes.to_string())
        };
        rules += usize::from(heading == "[[rule]]");
        let line = format!("{} = {value}", key.name);
        assert_ne!(read(&line), read(""), "{heading} {line}");
        assert!(key.name == "costs" || read(&line).is_ok(), "{heading} {line}: {:?}", read(&line));
    }
    assert_eq!(rules, keys::RULE.keys().count());
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_files_and_each_once() {
    let text = "[host]\nmemory = 1\n[group.a]\ngroup = \"b\"\n[group.b]\ngroup = \"a\"\n[machine.x]\nshares = 0\ngroup = \"no\"\n\
                [machine.y]\nminimum = \"2G\"\nmaximum = \"1G\"\n[[rule]]\nshares = 1\n[[rule]]\nname = \"*\"\nattach = false\n\
                limit = \"1G\"\n[[rule]]\nname = \"w\"\nreservation = \"4M\"\nlimit = \"1M\"\n[hosts]\n";
    let mistakes = Config::parse(text, "h").unwrap_err();
    let told: Vec<String> = mistakes.each().map(ToString::to_string).collect();
    let expected = [
        "h:2: memory = 1: write a size",
        "h:4: a is nested in b",
        "h:8: x has 0 shares",
        "h:9: x belongs to the group \"no\"",
        "h:11: y has a minimum of 2G",
        "h:13: rule 1 has no condition: say which machines it is for, or name = \"*\" if it is for all",
        "h:18: rule 2 leaves machines alone and says limit of them",
        "h:21: rule 3 reserves 4M, more than its limit of 1M",
        "h:23: unknown key `hosts`: use one of `host`, `group`, `machine`, `rule`",
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "{told}\n{expected}");
    }
    assert!(mistakes.to_string().ends_with("(8 more: `plimsoll config check` tells all)"), "{mistakes}");
    let broken = Config::parse("[host\n[group.a]\nshares =\n", "h").unwrap_err();
    assert!(broken.each().count() >= 2, "{broken:?}");
}

#[test]
fn files_beside_the_settings_are_machines_and_groups_of_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str, text: &str| {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    at("plimsoll.toml", "[host]\nmemory = \"4G\"\n[machine.db]\n");
    at("groups.d/tenant.toml", "limit = \"2G\"\n");
    at("machines.d/web.toml", "group = \"tenant\"\nshares = 7\n");
    for ignored in ["machines.d/web.toml~", "machines.d/.web.toml", "machines.d/web.toml.dpkg-old"] {
        at(ignored, "nonsense");
    }
    let main = folder.path().join("plimsoll.toml");
    let config = Config::read(&main).unwrap();
    assert_eq!(config.machines.keys().collect::<Vec<_>>(), ["db", "web"]);
    assert_eq!(config.machine("web").parent, Some(config.groups["tenant"].id));
    at("machines.d/web.toml", "group = \"tenant\"\n\nshare = 7\n");
    at("machines.d/db.toml", "");
    at("groups.d/tenant.toml", "[limit\n");
    let told: Vec<String> = Config::read(&main).unwrap_err().each().map(ToString::to_string).collect();
    let shown = folder.path().display();
    for (told, expected) in told.iter().zip([
        format!("{shown}/groups.d/tenant.toml:1: unclosed table"),
        format!("{shown}/machines.d/db.toml:1: db is said here and in {shown}/plimsoll.toml:3: leave one"),
        format!("{shown}/machines.d/web.toml:1: web belongs to the group \"tenant\", which is not there"),
        format!("{shown}/machines.d/web.toml:3: unknown key `share`: use one of"),
    ]) {
        assert!(told.starts_with(&expected), "{told}\n{expected}");
    }
    assert_eq!(told.len(), 4, "{told:#?}");
}

#[test]
fn the_chapter_lists_the_keys_as_they_are() {
    let chapter = include_str!("../../../../docs/config.md");
    let listed = chapter.split_once("<!-- plimsoll config docs -->\n").map(|(_, listed)| listed.trim());
    assert_eq!(
        listed,
        Some(keys::reference().trim()),
        "put what `plimsoll config docs` says at the end of docs/config.md"
    );
}
