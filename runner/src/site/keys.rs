//! Every key of a site file: the only list there is. The reader refuses what is not in it, the JSON schema and
//! `docs/site.md` are made from it.
//!
//! Not here: what the values mean (the modules beside this one), whether names exist (`prove`).

/// What a value looks like.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Any text.
    Text,
    /// A file or folder.
    Path,
    /// `512MiB`.
    Size,
    /// `200MiB/s`, or `none`.
    Rate,
    /// `10m`.
    Duration,
    /// A whole number.
    Number(u64, u64),
    /// `true` or `false`.
    Truth,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// Texts under names of one's own choosing.
    TextMap,
    /// A table.
    Table(&'static Shape),
    /// Tables under names of one's own choosing.
    Named(&'static Shape),
    /// A list of tables.
    Tables(&'static Shape),
    /// Tables under names of one's own choosing, whose `kind` says which shape they have.
    NamedKinds(&'static [&'static Shape]),
    /// A reference to a secret.
    Secret,
}

/// A key of a table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// Whether it has to be there.
    pub must: bool,
    /// What it says.
    pub doc: &'static str,
}

/// A table.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// As documents call it.
    pub name: &'static str,
    /// What it describes.
    pub doc: &'static str,
    /// What it may hold.
    pub keys: &'static [Key],
}

impl Shape {
    /// The names of its keys.
    pub fn names(&self) -> Vec<&'static str> {
        self.keys.iter().map(|key| key.name).collect()
    }
}

const fn may(name: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { name, kind, must: false, doc }
}

const fn must(name: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { name, kind, must: true, doc }
}

/// The whole file.
pub const SITE: Shape = Shape {
    name: "the site file",
    doc: "One site in one file. Names are the cross-reference; `aquifer config check` proves every one.",
    keys: &[
        must("version", Kind::Number(super::SITE_VERSION, super::SITE_VERSION), "format of this file"),
        may("home", Kind::Path, "folder for state"),
        may("cache", Kind::Size, "decoded blocks kept in memory, for each process"),
        may("site", Kind::Table(&ABOUT), "what the site is called"),
        may("catalogue", Kind::Table(&CATALOGUE), "where jobs, sessions and replicas are recorded"),
        may("repository", Kind::Named(&REPOSITORY), "where restore points are kept"),
        may("host", Kind::NamedKinds(&[&HOST_QEMU, &HOST_CLUSTER, &HOST_LIBVIRT, &HOST_PROXMOX]), "where machines run"),
        may("machine", Kind::Named(&MACHINE), "what is protected"),
        may("job", Kind::NamedKinds(JOBS), "what is done, and when"),
        may("plan", Kind::Named(&PLAN), "in which order machines fail over"),
        may("proxy", Kind::Table(&PROXY), "how much is done at once"),
        may("notify", Kind::Table(&NOTIFY), "read and checked; nothing is sent by this build"),
        may("api", Kind::Table(&API), "read and checked; not served by this build"),
    ],
};

const ABOUT: Shape = Shape {
    name: "site",
    doc: "What the site is called.",
    keys: &[
        may("name", Kind::Text, "name in reports"),
        may(
            "timezone",
            Kind::Text,
            "IANA zone of all clock times in schedules; everything stored is UTC (default UTC)",
        ),
    ],
};

const CATALOGUE: Shape = Shape {
    name: "catalogue",
    doc: "SQLite where nothing is said: `catalogue.db` in the folder for state.",
    keys: &[
        must("url", Kind::Text, "`sqlite:PATH` or `postgres://USER@HOST/DATABASE`"),
        may("password", Kind::Secret, "of the PostgreSQL user"),
    ],
};

const PROXY: Shape = Shape {
    name: "proxy",
    doc: "How much one worker does at once.",
    keys: &[
        may("max_tasks", Kind::Number(1, 1024), "disks worked on at once by one worker (default 4)"),
        may("read", Kind::Rate, "what all tasks together may read"),
        may("write", Kind::Rate, "what all tasks together may write"),
    ],
};

const REPOSITORY: Shape = Shape {
    name: "repository.NAME",
    doc: "A folder with restore points. Two repositories never share or nest folders.",
    keys: &[
        must("url", Kind::Path, "its folder; `s3://` is not built yet"),
        may("default", Kind::Truth, "whether commands use it when none is named"),
        may("max_tasks", Kind::Number(1, 1024), "disks read or written at once (default 4)"),
        may("limits", Kind::Table(&LIMITS), "how fast it is read and written"),
        may("foreign", Kind::Text, "not built yet"),
        may("s3", Kind::Table(&S3), "not built yet"),
        may("key", Kind::Secret, "not built yet"),
    ],
};

const LIMITS: Shape = Shape {
    name: "limits",
    doc: "Rates of all tasks together.",
    keys: &[
        may("read", Kind::Rate, "reading"),
        may("write", Kind::Rate, "writing"),
        may("hours", Kind::Tables(&HOURS), "other rates at other times; the lowest that applies counts"),
    ],
};

const HOURS: Shape = Shape {
    name: "hours",
    doc: "Rates for a part of the day.",
    keys: &[
        must("from", Kind::Text, "clock time, as `08:00`"),
        must("to", Kind::Text, "clock time; earlier than `from` is the next day"),
        may("read", Kind::Rate, "reading"),
        may("write", Kind::Rate, "writing"),
    ],
};

const S3: Shape = Shape {
    name: "s3",
    doc: "Not built yet.",
    keys: &[
        may("endpoint", Kind::Text, "its URL"),
        may("region", Kind::Text, "its region"),
        may("path_style", Kind::Truth, "whether the bucket stands in the path"),
    ],
};

const HOST_QEMU: Shape = Shape {
    name: "qemu",
    doc: "Machines that aquifer starts and steers itself. A machine is a folder `IMAGES/MACHINE/` with `machine.toml` and its disks: `docs/machines.md` says what stands in it, and how a machine is started so that it can be seen.",
    keys: &[
        must("kind", Kind::OneOf(&["qemu"]), "this one"),
        must("images", Kind::Path, "folder of the machines"),
        may("runtime", Kind::Path, "folder of the QMP sockets of running machines (default: below the runtime folder)"),
        may("max_tasks", Kind::Number(1, 1024), "disks read or written at once (default 4)"),
        may("address", Kind::Text, "a mover on another computer: not built yet"),
    ],
};

const HOST_CLUSTER: Shape = Shape {
    name: "cluster",
    doc: "Hosts that have one folder of machines between them, each where it has it mounted. A replica stands on one member; when that is lost, another one goes on with it and starts it.",
    keys: &[
        must("kind", Kind::OneOf(&["cluster"]), "this one"),
        must("members", Kind::Texts, "names of hosts of the kind `qemu`; the first that can be used is used"),
        may("max_tasks", Kind::Number(1, 1024), "disks read or written at once on all of them (default: their sum)"),
    ],
};

const HOST_LIBVIRT: Shape = Shape {
    name: "libvirt",
    doc: "Not built yet.",
    keys: &[must("kind", Kind::OneOf(&["libvirt"]), "this one"), must("uri", Kind::Text, "connection")],
};

const HOST_PROXMOX: Shape = Shape {
    name: "proxmox",
    doc: "Not built yet.",
    keys: &[
        must("kind", Kind::OneOf(&["proxmox"]), "this one"),
        must("url", Kind::Text, "its API"),
        may("fingerprint", Kind::Text, "of its certificate"),
        may("token", Kind::Secret, "API token"),
    ],
};

const MACHINE: Shape = Shape {
    name: "machine.NAME",
    doc: "A machine: of a host (`from`), or images that nothing runs on (`disks`).",
    keys: &[
        may("from", Kind::Text, "`HOST:NAME`, the machine on its host"),
        may("disks", Kind::TextMap, "disk = SOURCE, for a machine of plain images"),
        may("description", Kind::Path, "TOML or libvirt domain XML, for a machine of plain images"),
        may("rpo", Kind::Duration, "a warning where its newest point is older"),
        may("exclude_disks", Kind::Texts, "disks that are left out"),
    ],
};

const SCHEDULE: Shape = Shape {
    name: "schedule",
    doc: "When a job runs: one of `daily`, `monthly`, `every`, `continuous`, `after`, `on_new_point`, `calendar`, `cron`, `manual`. No schedule is `manual`.",
    keys: &[
        may("daily", Kind::Text, "clock time"),
        may("days", Kind::Text, "with `daily`: `mon-fri`, `sat,sun`"),
        may("monthly", Kind::Text, "clock time"),
        may(
            "day",
            Kind::Text,
            "with `monthly`: `15` (in a shorter month its last day), `last`, `first sun`, `last sat`",
        ),
        may("every", Kind::Duration, "even grid from midnight, at most `24h`"),
        may("offset", Kind::Duration, "with `every`: the first point of each day"),
        may(
            "window",
            Kind::Text,
            "with `every`, `continuous`, `on_new_point`: when runs may start, `mon-fri 20:00-06:00; sat,sun 00:00-24:00`",
        ),
        may("continuous", Kind::Truth, "again as soon as the last run has ended"),
        may("after", Kind::Text, "another job's name: when it has ended, however"),
        may("on_new_point", Kind::Truth, "when a source repository has received a point"),
        may("calendar", Kind::Text, "`hourly`, `Sun 04:00`, `Mon..Fri *-*-* 22:00`"),
        may("cron", Kind::Text, "cron pattern of five or six fields"),
        may("manual", Kind::Truth, "only when asked for"),
        may("jitter", Kind::Duration, "each run starts up to this much later"),
        may(
            "catch_up",
            Kind::Truth,
            "whether one run makes up for those that were missed while nothing ran (default true)",
        ),
    ],
};

const RETRY: Shape = Shape {
    name: "retry",
    doc: "What is tried again after a failure: only the machines that failed.",
    keys: &[
        may("count", Kind::Number(0, 100), "how often (default 3)"),
        may("interval", Kind::Duration, "how long after (default `10m`)"),
    ],
};

const KEEP: Shape = Shape {
    name: "keep",
    doc: "Which points stay: what any rule wants. Without this everything stays.",
    keys: &[
        may("last", Kind::Number(1, 100_000), "the newest points"),
        may(
            "days",
            Kind::Number(1, 36_500),
            "points of so many days (that of the run not counted), never fewer than 3",
        ),
        may("hourly", Kind::Number(1, 100_000), "the newest point of so many hours that have one"),
        may("daily", Kind::Number(1, 36_500), "of so many days"),
        may("weekly", Kind::Number(1, 5200), "of so many weeks (ISO)"),
        may("monthly", Kind::Number(1, 1200), "of so many months"),
        may("yearly", Kind::Number(1, 100), "of so many years"),
    ],
};

const SCRIPTS: Shape = Shape {
    name: "scripts",
    doc: "Programs around a run; one that fails makes the run a warning.",
    keys: &[may("pre", Kind::Path, "before the first disk"), may("post", Kind::Path, "after the last")],
};

const NETWORK: Shape = Shape {
    name: "network_map",
    doc: "A network of the source and what takes its place.",
    keys: &[
        must("from", Kind::Text, "network or bridge of the source"),
        must("to", Kind::Text, "network or bridge of the target"),
        may("from_vlan", Kind::Number(0, 4094), "0 is any"),
        may("to_vlan", Kind::Number(0, 4094), "0 is untagged"),
    ],
};

const REIP: Shape = Shape {
    name: "reip",
    doc: "A rule for addresses, recorded with the replica and applied at failover.",
    keys: &[
        must("from", Kind::Text, "`10.1.0.*`: a star is any number, 0 is 0"),
        must("to", Kind::Text, "`10.2.0.*`"),
        must("mask", Kind::Text, "netmask"),
        may("gateway", Kind::Text, "default gateway"),
        may("dns", Kind::Texts, "name servers"),
        may(
            "through",
            Kind::OneOf(&["programs", "agent"]),
            "who changes them: programs of a plan, which are given the rules (default), or the guest's agent, which is waited for",
        ),
    ],
};

const REPLICA_SOURCE: Shape = Shape {
    name: "source",
    doc: "Where a replica's content comes from.",
    keys: &[
        must("from", Kind::OneOf(&["production", "backup"]), "production storage, or restore points only"),
        may("repositories", Kind::Texts, "with `backup`: the newest complete point of any of them is taken"),
        may(
            "catch_up",
            Kind::OneOf(&["latest", "all"]),
            "with `backup`: the newest point only, or each that was missed",
        ),
        may(
            "imported",
            Kind::Truth,
            "whether repositories that belong to another installation, which goes on writing them, are read as well (default false: refused)",
        ),
        may("prefer_backup", Kind::Duration, "with `production`: a restore point, if it is younger than this"),
        may("seed", Kind::Text, "with `production`: repository for the first run"),
    ],
};

const TARGET: Shape = Shape {
    name: "target",
    doc: "Where replicas stand.",
    keys: &[
        must("host", Kind::Text, "name of a host, or of a cluster"),
        may("path", Kind::Path, "another folder than the host's `images`"),
    ],
};

/// What every job has, put before each kind's own keys.
macro_rules! job {
    ($name:literal, $doc:literal, $($key:expr),+ $(,)?) => {
        Shape {
            name: $name,
            doc: $doc,
            keys: &[
                must("kind", Kind::OneOf(&[$name]), "this one"),
                may("enabled", Kind::Truth, "whether it runs by itself (default true)"),
                may("high_priority", Kind::Truth, "before other jobs"),
                may("schedule", Kind::Table(&SCHEDULE), "when"),
                may("retry", Kind::Table(&RETRY), "after a failure"),
                may("scripts", Kind::Table(&SCRIPTS), "around each run"),
                may("limits", Kind::Table(&LIMITS), "how fast this job reads and writes"),
                may("ping", Kind::Text, "URL to tell; read, but not called by this build"),
                $($key),+
            ],
        }
    };
}

/// The kinds of jobs.
pub const JOBS: &[&Shape] = &[&BACKUP, &REPLICATION, &COPY, &HEALTH, &VERIFICATION];

const BACKUP: Shape = job!(
    "backup",
    "Makes a restore point of each machine.",
    must("machines", Kind::Texts, "names of machines"),
    must("to", Kind::Text, "repository"),
    may("keep", Kind::Table(&KEEP), "which points stay afterwards"),
    may(
        "on_incremental_impossible",
        Kind::OneOf(&["full", "fail"]),
        "what to do where the changed blocks are not known: read and compare everything (always reported), or fail"
    ),
    may(
        "freeze",
        Kind::OneOf(&["require", "try", "off"]),
        "application-consistent points by the guest agent: or fail; or crash-consistent (default), with a warning where the machine has an agent that does not do it, with a note where it has none; or never"
    ),
    may("parallel_disks", Kind::Number(1, 64), "disks of a machine at once (default 4)"),
);

const REPLICATION: Shape = job!(
    "replication",
    "Keeps a machine ready to start on another host.",
    must("machines", Kind::Texts, "names of machines"),
    must("source", Kind::Table(&REPLICA_SOURCE), "where content comes from"),
    must("target", Kind::Table(&TARGET), "where replicas stand"),
    may("name_suffix", Kind::Text, "replica's name = machine's name + this (default `_replica`)"),
    may("restore_points_to_keep", Kind::Number(1, 1000), "points of each replica (default 7)"),
    may("metadata_repository", Kind::Text, "repository for digests (default: the first source repository)"),
    may("network_map", Kind::Tables(&NETWORK), "networks of the target"),
    may("reip", Kind::Tables(&REIP), "addresses at failover"),
    may("mapping", Kind::TextMap, "machine = existing machine on the target to be its replica"),
    may("parallel_disks", Kind::Number(1, 64), "disks of a machine at once (default 4)"),
    may("block_size", Kind::Size, "of digests: 64KiB to 1MiB, a power of two (default 256KiB)"),
    may("rpo_warn", Kind::Duration, "a warning where the newest point is older"),
    may("verify", Kind::Truth, "whether what was written is read back and compared"),
);

const COPY: Shape = job!(
    "copy",
    "Copies restore points to another repository, whatever its block size.",
    must("machines", Kind::Texts, "names of machines"),
    must("from", Kind::Texts, "repositories; of points that several have, the first one's is taken"),
    must("to", Kind::Text, "repository"),
    may(
        "mode",
        Kind::OneOf(&["immediate", "periodic"]),
        "every new point, oldest first, after a first run that copies the newest alone; or the newest at each run (default)"
    ),
    may("keep", Kind::Table(&KEEP), "which points stay afterwards"),
);

const HEALTH: Shape = job!(
    "health",
    "Reads stored points back and repairs what is damaged from another copy.",
    must("repository", Kind::Text, "what is checked"),
    may("machines", Kind::Texts, "only these (default: all in the repository)"),
    may("points", Kind::OneOf(&["latest", "all"]), "of each machine (default `latest`)"),
    may("repair_from", Kind::Texts, "repositories with copies"),
);

const VERIFICATION: Shape = job!(
    "verification",
    "Not built yet.",
    must("machines", Kind::Texts, "names of machines"),
    may("checks", Kind::Texts, "what is tested"),
);

const PLAN: Shape = Shape {
    name: "plan.NAME",
    doc: "Machines that fail over together.",
    keys: &[
        must("entries", Kind::Tables(&ENTRY), "in this order"),
        may(
            "fence",
            Kind::OneOf(&["graceful", "force", "none"]),
            "what happens to the source machines (default `none`)",
        ),
        may("pre", Kind::Texts, "programs before the first machine"),
        may("post", Kind::Texts, "programs after the last"),
        may("at_once", Kind::Number(1, 1000), "machines starting at once (default 10)"),
    ],
};

const ENTRY: Shape = Shape {
    name: "entries",
    doc: "A machine of a plan.",
    keys: &[
        must("machine", Kind::Text, "name of a machine that a replication job covers"),
        may("after", Kind::Texts, "machines of this plan that are ready before; without it the entry before"),
        may("delay", Kind::Duration, "waited after its start"),
        may("gate", Kind::Text, "ready when: `agent`, `tcp:PORT`, `http:PORT/PATH`, or a program's path"),
        may("gates", Kind::Texts, "several of them, the one after the other; behind `gate`, where both are given"),
        may("timeout", Kind::Duration, "how long its gates may take together (default `5m`)"),
        may("on_failure", Kind::OneOf(&["continue", "stop", "wait"]), "what then (default `continue`)"),
    ],
};

const NOTIFY: Shape = Shape {
    name: "notify",
    doc: "Read and checked; nothing is sent by this build, and `config check` says so.",
    keys: &[
        may("target", Kind::NamedKinds(&[&SMTP, &NTFY, &GOTIFY, &WEBHOOK, &COMMAND]), "whom to tell"),
        may("route", Kind::Tables(&ROUTE), "what to tell whom"),
    ],
};

const SMTP: Shape = Shape {
    name: "smtp",
    doc: "Mail.",
    keys: &[
        must("kind", Kind::OneOf(&["smtp"]), "this one"),
        must("to", Kind::Texts, "addresses"),
        must("server", Kind::Text, "mail server"),
        may("from", Kind::Text, "sender"),
        may("password", Kind::Secret, "of the sender"),
    ],
};

const NTFY: Shape = Shape {
    name: "ntfy",
    doc: "ntfy.",
    keys: &[
        must("kind", Kind::OneOf(&["ntfy"]), "this one"),
        must("url", Kind::Text, "of the topic"),
        may("token", Kind::Secret, "access token"),
    ],
};

const GOTIFY: Shape = Shape {
    name: "gotify",
    doc: "Gotify.",
    keys: &[
        must("kind", Kind::OneOf(&["gotify"]), "this one"),
        must("url", Kind::Text, "of the server"),
        may("token", Kind::Secret, "application token"),
    ],
};

const WEBHOOK: Shape = Shape {
    name: "webhook",
    doc: "Any URL.",
    keys: &[must("kind", Kind::OneOf(&["webhook"]), "this one"), must("url", Kind::Text, "called with POST")],
};

const COMMAND: Shape = Shape {
    name: "command",
    doc: "A program.",
    keys: &[must("kind", Kind::OneOf(&["command"]), "this one"), must("run", Kind::Path, "the program")],
};

const ROUTE: Shape = Shape {
    name: "route",
    doc: "What is told to whom.",
    keys: &[
        may("severity", Kind::Texts, "`info`, `warning`, `error`"),
        may("type", Kind::Texts, "kinds of events"),
        may("job", Kind::Texts, "jobs"),
        may("machine", Kind::Texts, "machines"),
        must("to", Kind::Texts, "names of targets"),
    ],
};

const API: Shape = Shape {
    name: "api",
    doc: "Read and checked; not served by this build, and `config check` says so.",
    keys: &[may("listen", Kind::Texts, "addresses of the API"), may("metrics", Kind::Text, "address of the metrics")],
};

/// How a secret is referred to; exactly one of them.
pub const SECRET: Shape = Shape {
    name: "secret",
    doc: "Where a secret is: never the secret itself.",
    keys: &[
        may("credential", Kind::Text, "name of a systemd credential"),
        may("file", Kind::Path, "file, which is refused unless its owner alone may use it (`chmod 600`)"),
        may("command", Kind::Text, "program that prints it"),
        may("env", Kind::Text, "environment variable"),
    ],
};
