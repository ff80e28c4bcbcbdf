//! The `nanite` program.

fn main() -> std::process::ExitCode {
    nanite::cli::run(std::env::args_os())
}
