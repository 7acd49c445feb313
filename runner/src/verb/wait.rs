//! `wait`: until a recovery has reached a state.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use aquifer_mount::session::{Registry, State};

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::Power,
    recover::{finish, view::View},
    units,
};

/// How often the session is looked at.
const EVERY: Duration = Duration::from_millis(200);

/// Options of `wait`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The session
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// What to wait for: running, local, off, or state=NAME
    #[arg(long = "for", value_name = "STATE", default_value = "local")]
    pub state: Goal,
    /// How long at most, like 10m; exit code 13 when it passes
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The machine runs.
    Running,
    /// Everything is local.
    Local,
    /// The machine is off.
    Off,
    /// The session is in this state.
    State(State),
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "running" => Ok(Self::Running),
            "local" => Ok(Self::Local),
            "off" => Ok(Self::Off),
            _ => {
                let name = text.strip_prefix("state=").ok_or("it is running, local, off or state=NAME")?;
                let found = State::ALL.into_iter().find(|s| s.to_string().eq_ignore_ascii_case(name));
                let all = || State::ALL.map(|s| s.to_string()).join(", ");
                found.map(Self::State).ok_or_else(|| format!("no state is called {name}; there are {}", all()))
            }
        }
    }
}

impl Goal {
    fn reached(self, view: &View) -> bool {
        let power = view.machine.as_ref().map(|m| m.power);
        let has = |wanted| power.is_some_and(|power| power == Some(wanted));
        match self {
            Self::Running => has(Power::Running),
            Self::Off => power.is_none() || has(Power::Off),
            Self::Local => view.status.is_local(),
            Self::State(state) => view.status.state == state,
        }
    }

    /// Whether it can never be reached from here without somebody doing something.
    fn out_of_reach(self, view: &View) -> bool {
        match self {
            Self::State(state) => state != view.status.state && view.status.state == State::Stopped,
            Self::Off => false,
            Self::Running | Self::Local => matches!(view.status.state, State::Stopped | State::Failed),
        }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let limit = args.timeout.as_deref().map(units::parse_duration).transpose()?;
    let stop = context.stop()?;
    let folder = Registry::new(&context.home()?).resolve(&args.session)?;
    let start = Instant::now();
    let first = View::of(&folder)?;
    let progress = context.out.progress("waiting", (args.state == Goal::Local).then_some(first.used_bytes));
    loop {
        let view = View::of(&folder)?;
        progress.set(view.local_bytes);
        if args.state.reached(&view) {
            drop(progress);
            context.out.closing("seconds", start.elapsed().as_secs_f64());
            context.out.closing("state", view.status.state.to_string());
            return Ok(());
        }
        if args.state == Goal::Local
            && let Some(fail) = finish::copy_failed(&view.status)
        {
            return Err(fail);
        }
        if args.state.out_of_reach(&view) {
            return Err(Fail::new(Code::State, format!("{} is {}", view.status.name, view.status.state)));
        }
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            let what = format!("{} has not reached that in time; it is {}", view.status.name, view.status.state);
            return Err(Fail::new(Code::Timeout, what).help(format!("aquifer status {}", view.status.name)));
        }
        stop.check()?;
        stop.wait(EVERY);
    }
}
