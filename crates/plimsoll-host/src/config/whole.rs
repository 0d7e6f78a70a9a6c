//! Settings put together from their files, and what contradicts what.
//!
//! Enters: files. Leaves: a [`Config`], or all mistakes: what each value can be wrong in by itself, then each machine, group and rule by
//! itself, then all of them together. Of what has a mistake the usual is assumed further on, so that one is not told as two.
use super::error::{Mistakes, Wrong, key};
use super::keys::{API, GROUP, HOST, MACHINE, MEANS, ROLES, RULE};
use super::read::{Place, Said, Source};
use super::rules::{Conditions, Pattern, Rule};
use super::texts::{Texted, Texts};
use super::{ApiConfig, Config, ConfigError, FaceConfig, MachineConfig, RemoteConfig, Role};
use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::costs::CostsFile;
use plimsoll_policy::settings::{
    BUFFER_USUAL, Face, GroupSettings, MachineSettings, Owner, STALL_OBJECTIVE_USUAL, Settings,
    SettingsError, Shares, Terms,
};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::{Costs, Rung};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use toml::Spanned;
use toml::de::DeValue;

/// What files say, and what is wrong with them.
struct Reading<'a> {
    texts: Texted<'a>,
    host: Option<Said>,
    groups: BTreeMap<String, Said>,
    machines: BTreeMap<String, Said>,
    rules: Vec<Said>,
    api: Option<Said>,
    mistakes: Vec<ConfigError>,
}

pub(super) fn read<'a>(path: &Path, texts: Texted<'a>) -> Result<Config, Mistakes> {
    let mut reading = Reading::of(texts);
    reading.file(path, Reading::host_file);
    let beside = path.parent().unwrap_or(Path::new(""));
    for (name, each) in [
        ("groups.d", Reading::group_file as fn(&mut Reading<'a>, &str, &str, &str)),
        ("machines.d", Reading::machine_file),
    ] {
        let directory = beside.join(name);
        match reading.texts.folder(&directory) {
            Ok(files) => {
                for (name, path) in files {
                    reading.file(&path, |reading, text, path| each(reading, text, path, &name));
                }
            }
            Err(source) => reading.unreadable(&directory, source),
        }
    }
    reading.config(path)
}

pub(super) fn parse(text: &str, path: &str) -> Result<Config, Mistakes> {
    let mut texts = Texts::default();
    let mut reading = Reading::of(Texted::Now(&mut texts));
    reading.host_file(text, path);
    reading.config(Path::new(path))
}

impl<'a> Reading<'a> {
    const fn of(texts: Texted<'a>) -> Self {
        Self {
            texts,
            host: None,
            groups: BTreeMap::new(),
            machines: BTreeMap::new(),
            rules: Vec::new(),
            api: None,
            mistakes: Vec::new(),
        }
    }

    fn unreadable(&mut self, path: &Path, source: io::Error) {
        self.mistakes.push(ConfigError::Read { path: path.display().to_string(), source });
    }

    fn wrong(&mut self, place: &Place, wrong: Wrong) {
        self.mistakes.push(ConfigError::Wrong { place: place.clone(), wrong });
    }

    fn file(&mut self, path: &Path, understand: impl FnOnce(&mut Self, &str, &str)) {
        match self.texts.text(path) {
            Ok(text) => understand(self, &text, &path.display().to_string()),
            Err(source) => self.unreadable(path, source),
        }
    }

    /// The host's file, with tables of every kind.
    fn host_file(&mut self, text: &str, path: &str) {
        let mut mistakes = std::mem::take(&mut self.mistakes);
        let mut source = Source { path, text, mistakes: &mut mistakes };
        for (name, value) in source.table().unwrap_or_default() {
            let place = source.place(name.span().start);
            match &**name.get_ref() {
                "host" => self.host = Some(source.section(&HOST, place, value.into_inner())),
                name @ ("group" | "machine") => {
                    let (section, said) = match name {
                        "group" => (&GROUP, &mut self.groups),
                        _ => (&MACHINE, &mut self.machines),
                    };
                    for (key, value) in source.tables(name, value) {
                        let place = source.place(key.span().start);
                        let one = source.section(section, place, value.into_inner());
                        said.insert(key.into_inner().into_owned(), one);
                    }
                }
                "rule" => self.rules.extend(rules(&mut source, place, value)),
                "api" => self.api = Some(source.section(&API, place, value.into_inner())),
                other => {
                    let text = format!(
                        "unknown key `{other}`: use one of `host`, `group`, `machine`, `rule`, `api`"
                    );
                    source.wrong(place, Wrong::Syntax(text));
                }
            }
        }
        self.mistakes = mistakes;
    }

    fn group_file(&mut self, text: &str, path: &str, name: &str) {
        let said = self.single(&GROUP, text, path);
        self.enter(said, name, |reading| &mut reading.groups);
    }

    fn machine_file(&mut self, text: &str, path: &str, name: &str) {
        let said = self.single(&MACHINE, text, path);
        self.enter(said, name, |reading| &mut reading.machines);
    }

    /// A file that is one section.
    fn single(&mut self, section: &super::keys::Section, text: &str, path: &str) -> Option<Said> {
        let mut source = Source { path, text, mistakes: &mut self.mistakes };
        let table = source.table()?;
        let place = source.place(0);
        Some(source.section(section, place, DeValue::Table(table)))
    }

    fn enter(
        &mut self,
        said: Option<Said>,
        name: &str,
        of: impl Fn(&mut Self) -> &mut BTreeMap<String, Said>,
    ) {
        let Some(said) = said else { return };
        if let Some(before) = of(self).get(name).map(|before| before.place.clone()) {
            self.wrong(&said.place, Wrong::Twice { name: name.to_owned(), before });
        } else {
            of(self).insert(name.to_owned(), said);
        }
    }

    /// All of it as settings.
    fn config(mut self, path: &Path) -> Result<Config, Mistakes> {
        let ids: BTreeMap<String, GroupId> = self.groups.keys().cloned().zip((1..).map(GroupId)).collect();
        let (groups, machines) = (std::mem::take(&mut self.groups), std::mem::take(&mut self.machines));
        let (host, rules) = (self.host.take(), std::mem::take(&mut self.rules));
        let mut config = self.host_settings(host.as_ref(), path);
        if let Some(said) = self.api.take() {
            config.api = self.api(&said, path.parent().unwrap_or(Path::new("")));
        }
        for (name, said) in &groups {
            let id = ids.get(name).copied().unwrap_or(GroupId(0));
            let settings = GroupSettings {
                parent: self.parent(said, name, &ids),
                reservation: said.size("reservation"),
                limit: said.size("limit"),
                shares: said.count("shares").map_or(Shares::NORMAL, Shares),
                domain: said.flag("sharing").unwrap_or_default().then_some(DomainId(id.0)),
                ..GroupSettings::new(id)
            };
            config.groups.insert(name.clone(), settings);
        }
        for (name, said) in &machines {
            let machine = self.machine(said, name, &ids);
            config.machines.insert(name.clone(), machine);
        }
        for (said, number) in rules.iter().zip(1..) {
            let rule = self.rule(said, number, &ids);
            config.rules.push(rule);
        }
        let owners = Owners { host, groups, machines, rules };
        self.contradictions(&config, &owners, path);
        Mistakes::of(self.mistakes).map(|()| config)
    }

    fn host_settings(&mut self, said: Option<&Said>, path: &Path) -> Config {
        let mut config = Config::default();
        let Some(said) = said else { return config };
        config.memory = said.size("memory");
        config.reserve = said.size("reserve").unwrap_or_default();
        config.budget = said.size("budget");
        let reserve = config.reserve;
        if let Some(memory) = config.memory.filter(|memory| *memory <= reserve) {
            self.wrong(said.place_of("memory"), Wrong::NothingLeft { memory, reserve });
            config.memory = None;
        }
        match said.part("idle-tax").map(IdleTax::new).transpose() {
            Ok(tax) => config.tax = tax.unwrap_or(IdleTax::USUAL),
            Err(error) => self.wrong(said.place_of("idle-tax"), Wrong::Tax(error)),
        }
        config.storing_share = said.part("storing-share").unwrap_or(config.storing_share);
        if let Some(named) = said.path("costs") {
            let file = path.parent().unwrap_or(Path::new("")).join(named);
            config.costs = self.costs(&file, said.place_of("costs")).unwrap_or(config.costs);
        }
        config
    }

    /// Who may ask. Files are seen from `folder`.
    fn api(&mut self, said: &Said, folder: &Path) -> ApiConfig {
        let role = said.text("group-may").map_or(Role::Read, |word| match word == ROLES[0] {
            true => Role::Read,
            false => Role::Change,
        });
        let group = said.text("group").map(|name| (name.to_owned(), role));
        if group.is_none() && said.has("group-may") {
            self.wrong(said.place_of("group-may"), Wrong::Lacking { one: "group-may", missing: "group" });
        }
        ApiConfig { group, remote: self.remote(said, folder) }
    }

    /// Who may ask from elsewhere: nobody, or everything is said.
    fn remote(&mut self, said: &Said, folder: &Path) -> Option<RemoteConfig> {
        const ALL: [&str; 6] = ["listen", "certificate", "key", "client-ca", "may-change", "may-read"];
        let one = ALL.into_iter().find(|key| said.has(key))?;
        let (may_change, may_read) = (said.patterns("may-change"), said.patterns("may-read"));
        let missing = ALL[..4].iter().copied().find(|key| !said.has(key));
        let nobody = (may_change.is_empty() && may_read.is_empty()).then_some("may-change or may-read");
        if let Some(missing) = missing.or(nobody) {
            self.wrong(said.place_of(one), Wrong::Lacking { one, missing });
            return None;
        }
        let file = |key| said.path(key).map(|path| folder.join(path));
        Some(RemoteConfig {
            listen: said.address("listen")?,
            certificate: file("certificate")?,
            key: file("key")?,
            client_ca: file("client-ca")?,
            may_change,
            may_read,
        })
    }

    /// What taking memory costs here, from the file that the settings name.
    fn costs(&mut self, file: &Path, named: &Place) -> Option<Costs> {
        let path = file.display().to_string();
        let json = match self.texts.text(file) {
            Ok(json) => json,
            Err(error) => {
                self.wrong(named, Wrong::NoCosts { file: path, why: error.to_string() });
                return None;
            }
        };
        match serde_json::from_str::<CostsFile>(&json) {
            Ok(costs) => Some(Costs::from(&costs)),
            Err(error) => {
                let said = error.to_string();
                let what = said.rsplit_once(" at line ").map_or(&*said, |(what, _)| what);
                let what = match what.strip_prefix("unknown field ") {
                    Some(rest) => format!("unknown key {}", rest.replacen(", expected", ": use", 1)),
                    None => what.to_owned(),
                };
                self.wrong(&Place { path, line: error.line() }, Wrong::Syntax(what));
                None
            }
        }
    }

    fn parent(&mut self, said: &Said, owner: &str, ids: &BTreeMap<String, GroupId>) -> Option<GroupId> {
        let group = said.text("group")?;
        let found = ids.get(group).copied();
        if found.is_none() {
            let known = ids.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            let (owner, group) = (owner.to_owned(), group.to_owned());
            self.wrong(said.place_of("group"), Wrong::NoSuchGroup { owner, group, known });
        }
        found
    }

    fn machine(&mut self, said: &Said, name: &str, ids: &BTreeMap<String, GroupId>) -> MachineConfig {
        let face = face(name, said).unwrap_or_else(|(key, wrong)| {
            self.wrong(said.place_of(key), wrong);
            MachineConfig::default().face
        });
        let highest = said.text("highest").and_then(|word| MEANS.iter().find(|(own, _)| *own == word));
        MachineConfig {
            parent: self.parent(said, name, ids),
            face,
            highest: highest.map_or(Rung::Disk, |(_, rung)| *rung),
            stall_objective: said.part("stall-objective").unwrap_or(STALL_OBJECTIVE_USUAL),
            qmp: said.path("qmp"),
            api: said.path("api"),
        }
    }

    fn rule(&mut self, said: &Said, number: usize, ids: &BTreeMap<String, GroupId>) -> Rule {
        let name = format!("rule {number}");
        let pattern = |key: &str| said.text(key).map(Pattern::new);
        let conditions = Conditions {
            vmm: said.text("vmm").map(str::to_owned),
            name: pattern("name"),
            command_line: pattern("command-line"),
            cgroup: pattern("cgroup"),
            user: pattern("user"),
        };
        if conditions == Conditions::default() {
            self.wrong(&said.place, Wrong::NoCondition { rule: name.clone() });
        }
        let place = said.place.clone();
        if said.flag("attach").unwrap_or(true) {
            let config = Some(self.machine(said, &name, ids));
            return Rule { number, place, conditions, config };
        }
        let settings = MACHINE.keys().find(|key| said.has(key.name));
        if let Some(key) = settings {
            self.wrong(said.place_of(key.name), Wrong::Idle { rule: name, key: key.name });
        }
        Rule { number, place, conditions, config: None }
    }

    /// Each by itself first, so that a contradiction inside one is not told as one among many; then what is left of them together.
    fn contradictions(&mut self, config: &Config, owners: &Owners, path: &Path) {
        let capacity =
            config.memory.map_or(ByteCount(u64::MAX), |memory| memory.saturating_sub(config.reserve));
        let mut settings = config.settings(capacity);
        // How many machines a rule will be for is not known: what it says is looked at by itself, and is not among all.
        let named = config.machines.iter().zip(owners.machines.values());
        let named = named.map(|((name, machine), said)| (name.clone(), said, machine));
        let ruled = config.rules.iter().zip(&owners.rules);
        let ruled = ruled
            .filter_map(|(rule, said)| Some((format!("rule {}", rule.number), said, rule.config.as_ref()?)));
        let owned: BTreeMap<MachineId, (String, &Said, &MachineConfig)> =
            (1..).map(MachineId).zip(named.chain(ruled)).collect();
        let mut tell = |error: SettingsError| {
            let called = |owner| match owner {
                Owner::Machine(id) => owned.get(&id).map(|(name, ..)| name.clone()),
                Owner::Group(id) => super::group_name(&config.groups, id),
                Owner::Host => None,
            };
            let said = match error.owner() {
                Owner::Machine(id) => owned.get(&id).map(|(_, said, _)| *said),
                Owner::Group(_) => called(error.owner()).and_then(|name| owners.groups.get(&name)),
                Owner::Host => owners.host.as_ref(),
            };
            let start = Place { path: path.display().to_string(), line: 1 };
            let place = said.map_or(&start, |said| said.place_of(key(&error)));
            self.wrong(place, Wrong::Settings { text: error.named(&called).to_string(), error });
        };
        for (at, (id, (.., machine))) in owned.iter().enumerate() {
            let own: MachineSettings = machine.settings(*id, machine.least());
            match Terms::of(&own) {
                Ok(_) if at < config.machines.len() => settings.machines.push(own),
                Ok(_) => {}
                Err(error) => tell(error),
            }
        }
        while let Err(error) = Tree::new(settings.clone()) {
            tell(error);
            if !left_out(&mut settings, error.owner()) {
                break;
            }
        }
    }
}

/// Who says what.
struct Owners {
    host: Option<Said>,
    groups: BTreeMap<String, Said>,
    machines: BTreeMap<String, Said>,
    rules: Vec<Said>,
}

/// Leaves out what somebody says whose mistake has been told. False if nothing is left of it.
fn left_out(settings: &mut Settings, owner: Owner) -> bool {
    match owner {
        Owner::Machine(id) => {
            let before = settings.machines.len();
            settings.machines.retain(|machine| machine.id != id);
            settings.machines.len() < before
        }
        Owner::Group(id) => settings.groups.iter_mut().find(|group| group.id == id).is_some_and(|group| {
            let before = std::mem::replace(group, GroupSettings::new(id));
            before != *group
        }),
        Owner::Host => false,
    }
}

/// The rules of a list of tables.
fn rules<'a>(source: &mut Source<'a>, place: Place, value: Spanned<DeValue<'a>>) -> Vec<Said> {
    let DeValue::Array(list) = value.into_inner() else {
        source.wrong(place, Wrong::Syntax("rule is no list of tables: write each as [[rule]]".to_owned()));
        return Vec::new();
    };
    list.into_iter()
        .map(|rule| {
            let place = source.place(rule.span().start);
            source.section(&RULE, place, rule.into_inner())
        })
        .collect()
}

/// Which face a machine shows. With a mistake, the key it is about.
fn face(name: &str, said: &Said) -> Result<FaceConfig, (&'static str, Wrong)> {
    let size = said.size("size");
    let first = |keys: &[&'static str]| keys.iter().copied().find(|key| said.has(key));
    let guarantee = first(&["reservation", "limit", "shares"]);
    let dynamic = first(&["minimum", "maximum", "startup", "buffer", "weight"]);
    let kind = first(&["kind"]);
    let own = size.map(|_| "size").filter(|_| dynamic.is_some());
    let faces: Vec<&'static str> = [dynamic, guarantee, kind, own].into_iter().flatten().collect();
    if let [one, other, ..] = *faces {
        return Err((other, Wrong::TwoFaces { machine: name.to_owned(), one, other }));
    }
    match said.text("kind") {
        Some("static") => return Ok(FaceConfig::Static { size }),
        Some(_) => return Ok(FaceConfig::Dedicated { size }),
        None => {}
    }
    let Some(one) = dynamic else {
        return Ok(FaceConfig::Guarantee {
            size,
            reservation: said.size("reservation").unwrap_or_default(),
            limit: said.size("limit"),
            shares: said.count("shares").map_or(Shares::NORMAL, Shares),
        });
    };
    let needed = |missing| {
        let wrong = || (one, Wrong::Missing { machine: name.to_owned(), one, missing });
        said.size(missing).ok_or_else(wrong)
    };
    let (minimum, maximum) = (needed("minimum")?, needed("maximum")?);
    Ok(FaceConfig::Whole(Face::Dynamic {
        startup: said.size("startup").unwrap_or(minimum),
        minimum,
        maximum,
        buffer: said.part("buffer").unwrap_or(BUFFER_USUAL),
        weight: said.count("weight").unwrap_or(Shares::NORMAL.0),
    }))
}
