//! Every `E_` and `W_` code: its name, its exit code, whether trying again may help, and what
//! `aquifer explain` says about it.
//!
//! Invariants
//! - A code exists only here; a code without an explanation cannot be written down.
//! - Exit codes: 2 failed, 3 refused by state, 4 usage, 10 no repository, 11 busy or leased, 12 key or
//!   access, 13 timeout or unreachable, 14 damage found, 130 and 143 interrupted.

macro_rules! codes {
    ($($variant:ident $name:literal $exit:literal $again:ident $text:literal)*) => {
        /// Why something failed, or what a warning is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $(#[doc = $text] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The name people and scripts see: `E_...` for errors, `W_...` for warnings.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// The exit code a failure with this code gives; 1 for warnings.
            pub fn exit(self) -> u8 {
                match self { $(Code::$variant => $exit,)* }
            }

            /// Whether the same command may succeed later with nothing changed by hand.
            pub fn retryable(self) -> bool {
                match self { $(Code::$variant => codes!(@$again),)* }
            }

            /// What it means and what to do, in plain words.
            pub fn text(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }
        }
    };
    (@later) => { true };
    (@never) => { false };
}

codes! {
    Usage "E_USAGE" 4 never
        "The command line does not say anything that can be done: an unknown option, a missing value, two options that exclude each other. Nothing was changed. `aquifer VERB --help` shows what the verb takes."
    Source "E_SOURCE" 4 never
        "The word given as SOURCE cannot be read as one. A SOURCE is a path (a word with `/`, or an existing file), `raw:PATH`, an NBD URI (`nbd://`, `nbds://`, `nbd+unix://`), or MACHINE[@POINT][:DISK] where POINT is `latest`, `latest~2`, an RFC 3339 time with a zone, or the first characters of a point id. Times without a zone are refused because they would mean another point on another machine."
    Unit "E_UNIT" 4 never
        "A size, rate or duration lacks its unit. Rates in particular are read as KiB/s by one tool and MiB/s by the next, so a bare number is refused: write `200MiB/s`, `200MB/s` or `1Gbit/s`; durations as `30s`, `10m`, `2h`."
    Config "E_CONFIG" 4 never
        "The site file cannot be used: it is not TOML, has an unknown key, or names something that is not there. The message says the line and column and the nearest known name. `aquifer config check` reads the file and changes nothing."
    Confirm "E_CONFIRM" 4 never
        "The command destroys something and nobody confirmed it: there is no terminal to ask on and `--yes` was not given. Nothing was changed. Run it with `-n` to see what would be lost, then with `--yes`."
    Ambiguous "E_AMBIGUOUS" 4 never
        "A name or id prefix fits more than one thing. The candidates are listed; give more characters, or `--disk NAME` where the question is which disk."
    NotFound "E_NOT_FOUND" 2 never
        "A file, machine, restore point, disk, session or export of that name does not exist. The message lists what does exist there, where that is known."
    Exists "E_EXISTS" 3 never
        "The target exists already and is never overwritten. Choose another name, or remove it yourself."
    State "E_STATE" 3 never
        "The operation is not possible in the present state. The message says which state it has, which one is needed and which operations are possible now."
    Refused "E_REFUSED" 3 never
        "A rule forbids it: a path that leads out of the image's own folder, a format that would have to be guessed from bytes a guest could have written, a listener on the network without TLS, a file inside a recovery session used as a source. The message names the option that allows it, where there is one."
    ForeignOwner "E_FOREIGN_OWNER" 3 never
        "The repository or chain is stamped by another owner. Two owners writing one chain would break it. Reading is always possible."
    ConfigDrift "E_CONFIG_DRIFT" 3 never
        "The machine that took over and the machine it comes home to are described differently: processors, memory, network cards, disks. A way home sends blocks only, so somebody has to decide: `--drift keep` leaves production's description as it is, `--drift apply` describes production as the replica when the sides are changed (undo takes that back). Nothing was changed yet."
    PointIncomplete "E_POINT_INCOMPLETE" 3 never
        "The restore point was never committed: its writer is still at work or was interrupted. It is invisible to readers. Run the same backup again; it resumes."
    Failed "E_FAILED" 2 never
        "The command did not reach its end. The message and the lines before it say where it stopped."
    Io "E_IO" 2 never
        "The operating system failed a call. The message has the file, the offset and the system's own error name."
    Capacity "E_CAPACITY" 2 later
        "A file system or a quota is full. Nothing that was acknowledged is lost; free space and run the command again. What an interrupted backup has stored stays for the next run to go on with; where that is not wanted, `aquifer forget --interrupted MACHINE` frees it."
    Unsupported "E_UNSUPPORTED" 2 never
        "The file is valid but uses a feature this build does not read or write, or the combination of options is not supported. The feature is named."
    OutOfRange "E_RANGE" 2 never
        "A range lies outside the disk or file. Nothing was read or written; ask for a range within the size that the message names."
    ReadOnly "E_READ_ONLY" 2 never
        "A write to something that is served or opened read-only. `mount --writable` gives a scratch overlay; the source itself is never written."
    Tool "E_TOOL" 2 never
        "A program that is needed is missing, too old, or ended with an error. `aquifer doctor` checks all of them and prints the commands that install them."
    Guest "E_GUEST" 2 never
        "The guest or its hypervisor process ended or did not reach the expected state. Its log is named in the message."
    Child "E_CHILD" 2 never
        "The command given with `--run` could not be started. (When it starts and fails, its own exit code is passed on.)"
    Bug "E_BUG" 2 never
        "A fault in aquifer itself. Whatever was acknowledged is safe; please report the message together with the command."
    NoRepository "E_NO_REPOSITORY" 10 never
        "No repository was named, or there is none at that place. Name one with `-r DIR`, the variable AQUIFER_REPO or `repository` in the site file; make one with `aquifer -r DIR init`."
    RepoOffline "E_REPO_OFFLINE" 13 later
        "The repository's storage does not answer."
    Busy "E_BUSY" 11 later
        "Another operation holds what is needed; the holder is named. Try again when it is done. A dead holder's lease runs out by itself: nothing has to be unlocked by hand."
    Fenced "E_FENCED" 11 never
        "A worker tried to go on with work that is no longer its own: it was paused or cut off past its lease, and another worker has taken the work over, or it was stopped. Nothing was changed; the other worker's result counts. `aquifer sessions` shows who has it."
    PointInUse "E_POINT_IN_USE" 11 later
        "The restore point is being read: mounted, recovered from, copied or verified; the reader is named. `forget` gives it up all the same with `--even-read`: the reader keeps its files until it ends. Retention does the same by itself and never waits."
    FileLocked "E_FILE_LOCKED" 11 later
        "Another writer holds what is needed: the message names it, what it does, since when, and its session where it has one. `aquifer leases` lists all. Nothing has to be unlocked by hand: the lease of one that is gone runs out."
    Key "E_KEY" 12 never
        "A key is needed and is missing or wrong. Nothing was read in part."
    Access "E_ACCESS" 12 never
        "The operating system denies access (EACCES or EPERM), or the peer refused the certificate. The message names the file or peer and what was tried."
    Timeout "E_TIMEOUT" 13 later
        "What was waited for did not come within the time allowed."
    Net "E_NET" 13 later
        "A peer cannot be reached or broke the connection."
    BlockCorrupt "E_BLOCK_CORRUPT" 14 never
        "Stored bytes do not match their checksum. Only the ranges named are affected; everything else reads correctly. The tool never returns other bytes instead. `aquifer verify SOURCE` lists all damage; another copy of the point, or the next backup, has the data."
    Corrupt "E_CORRUPT" 14 never
        "A structure of the file contradicts its format. The file and offset are named."
    Truncated "E_TRUNCATED" 14 never
        "The file ends before something it declares; it was cut short, perhaps by an interrupted copy."
    ChainBroken "E_CHAIN_BROKEN" 14 never
        "A file that the restore point needs is missing or is not the one it was made on. Points that do not need it are not affected. Put the file back under its name, or use another point."
    Interrupted "E_INTERRUPTED" 130 later
        "SIGINT (Ctrl-C) asked for an orderly stop. What was acknowledged is safe; backup, verify and recovery go on from where they stopped when run again."
    Terminated "E_TERMINATED" 143 later
        "SIGTERM asked for an orderly stop. What was acknowledged is safe; backup, verify and recovery go on from where they stopped when run again."
    WarnFallback "W_COMPARED" 1 never
        "An increment was wanted from a changed-block bitmap, but the bitmap is missing, was invalidated by a crash or does not belong to the newest point. The whole disk was read and compared instead: the point is right, it only cost more reading. The next increment can use the bitmap again if it is made new."
    WarnLease "W_LEASE_EXPIRED" 1 never
        "A lease was set aside because its holder has ended or stopped renewing it. The holder is named; if it is alive after all, its next write is refused."
    WarnInTheClear "W_IN_THE_CLEAR" 1 never
        "Data is served over TCP without encryption because that was asked for explicitly."
    WarnSkipped "W_SKIPPED" 1 never
        "Something that was asked for was left out; the message says what and why."
    WarnOlderPoint "W_OLDER_POINT" 1 never
        "`latest` or a time was asked for, and a newer point that fits is damaged or a file of it is missing. The newest complete one was taken: what was written after it is not in it. `aquifer verify MACHINE@ID` of the point that is named lists its damage; a missing file can be put back, a health job with `repair_from` repairs it from a copy, and the next backup makes a whole point. `aquifer verify MACHINE@latest` fails for as long as the newest point is damaged."
    WarnDamagedPoint "W_DAMAGED_POINT" 1 never
        "A restore point that is listed is damaged, or a file of it is missing: nothing can be read from it, while points that do not need what is lost are whole. `aquifer verify MACHINE@ID` lists the damage; a missing file can be put back, a health job with `repair_from` repairs the point from a copy, `aquifer forget MACHINE@ID` gives it up."
    WarnCheck "W_CHECK" 1 never
        "`aquifer doctor` found something that limits what this machine can do, or `aquifer config check` something that the site file names and that is not there. The command that repairs it is printed where there is one."
    WarnInterrupted "W_RESUMED" 1 never
        "An earlier run was interrupted; this one went on from what it had stored."
    WarnMissed "W_MISSED" 1 never
        "A job was due while nothing was there to run it. The schedule's `catch_up` decides whether one run makes up for it; the event says which due time it was and how many were missed."
    WarnOverrun "W_OVERRUN" 1 never
        "A job was due while its last run had not ended. It is not doubled: the next due time counts."
    WarnSession "W_SESSION" 1 never
        "The session reached its end, but something in it wants a look: a machine that was skipped, a point that could not be made application-consistent, an increment that became a full. `aquifer sessions ID` says which."
    WarnNoNewPoint "W_NO_NEW_POINT" 1 never
        "The newest backup is one that the replica has already. Nothing was copied and no restore point was added."
    WarnStale "W_STALE_SOURCE" 1 never
        "The backups that feed a replica are older than they should be: the job that makes them may have stopped. The replica is as new as the newest of them."
    WarnOnHold "W_ON_HOLD" 1 never
        "The replica is not replicated at present: it serves, is on its way home, waits for a guest or for somebody's word, or was given up. The other machines of its job are replicated all the same. The first run that finds it so says it, and another one when something else holds it. Replication goes on when it is ready again."
    WarnReplicaServes "W_REPLICA_SERVES" 1 never
        "A replica has taken over from the machine that the job backs up or copies, and nothing is settled yet. A backup of the machine that it serves in place of holds what is stale. Retention gives up and merges no point of the machine until the takeover is taken back (`undo`), has come home (`commit`) or was made final (`permanent`): points from before the disaster may be needed."
    WarnResync "W_RESYNC" 1 never
        "The digests of a replica were missing, damaged or no longer to be trusted. They were made anew from the replica's own disks; nothing was copied for that. The same is said of a layer that was changed from outside since it was settled: a takeover at a point that stands on it is refused where digests tell that it holds something else, a way home compares all of both sides, and what was changed between the two passes of a way home keeps the sides from being changed."
    WarnDiskGone "W_DISK_GONE" 1 never
        "A disk that the restore point before has is not in the new one: it was taken out of the machine's description, was renamed, or was not named. That may be meant; it is told once, when it happens. Of a backup's points the last one that has the disk stays, whatever retention says, until `aquifer -r REPOSITORY forget MACHINE@POINT` gives it up; that is told once, too. Of a replica's points it goes with the others, and the run before that tells. A takeover at a newer one has no such disk. Put the disk back if it belongs to the machine; where it is to be left out, `exclude_disks` of the machine in the site file says so."
    WarnTakenBack "W_TAKEN_BACK" 1 never
        "An earlier operation had been cut short, by a crash or a lost lease. What could not be finished was taken back before this one began."
    WarnHost "W_HOST" 1 never
        "The host could not do everything that was asked for; the message says what was done instead."
}

impl Code {
    /// The code of that name, in any case, with or without its `E_` or `W_`.
    pub fn find(name: &str) -> Option<Code> {
        let name = name.trim().to_ascii_uppercase();
        let bare = |n: &str| n.trim_start_matches("E_").trim_start_matches("W_").to_owned();
        let exact = Self::ALL.iter().find(|c| c.name() == name);
        exact.or_else(|| Self::ALL.iter().find(|c| bare(c.name()) == bare(&name))).copied()
    }

    /// Whether it is a warning.
    pub fn is_warning(self) -> bool {
        self.name().starts_with("W_")
    }
}
