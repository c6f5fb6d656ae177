//! Prints the OpenAPI document: `cargo run -p oblak-api --example openapi > openapi/oblak.json`.

fn main() {
    println!("{}", serde_json::to_string_pretty(&oblak_api::openapi::document()).expect("a JSON value serializes"));
}
