//! Prints durable creates per second beside bare redb: `cargo run --release -p oblak-store --features bench --example creates [DIR]`.

use std::path::PathBuf;

use oblak_store::bench::{CreatesOptions, durable_creates};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let base = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("oblak-store-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let measured = durable_creates(&dir, CreatesOptions::default());
    std::fs::remove_dir_all(&dir)?;
    println!("{:#?}", measured?);
    Ok(())
}
