//! The one binary: `aquifer`.

fn main() -> std::process::ExitCode {
    aquifer_runner::main(std::env::args_os())
}
