// Prints the SHA-256 of the values of every array that is named: node zarrita.mjs STORE NAME...
import { createHash } from "node:crypto";
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const [path, ...names] = process.argv.slice(2);
const store = zarr.root(new FileSystemStore(path));
for (const name of names) {
  const array = await zarr.open.v3(store.resolve(name), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const digest = createHash("sha256").update(bytes).digest("hex");
  console.log(JSON.stringify({ name, shape, dimensions: array.dimensionNames, digest }));
}
