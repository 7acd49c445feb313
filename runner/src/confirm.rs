//! Asking before something is destroyed.

use std::io::{self, BufRead, IsTerminal};

use crate::{
    cli::Confirm,
    context::Context,
    fail::{Code, Fail, Result},
};

/// Says what is lost and asks, unless `--yes` was given. Changes nothing itself.
///
/// # Errors
/// [`Code::Confirm`] where nobody can be asked, or the answer is not `yes`.
pub fn confirm(context: &Context, confirm: &Confirm, loss: &str) -> Result<()> {
    if confirm.yes {
        return Ok(());
    }
    context.out.say_lines(loss);
    if !io::stdin().is_terminal() || !context.out.is_terminal() {
        return Err(Fail::new(Code::Confirm, "nobody can be asked here, and --yes was not given")
            .help_again("--yes    # or with -n, to look first"));
    }
    context.out.say("type yes to go on:");
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|e| Fail::io("the terminal", "read", &e))?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(Fail::new(Code::Confirm, "not confirmed; nothing was changed")),
    }
}
