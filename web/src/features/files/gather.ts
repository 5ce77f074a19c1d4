/** Pictures that somebody has picked, and the zip that they become. No React, no network. */

export interface Picked {
  path: string; // within a folder, or the name alone
  file: File;
}

export interface Gathered {
  pictures: readonly Picked[];
  captions: readonly Picked[]; // files of captions that lay beside them
  leftOut: number; // of other files, those that systems hide away not counted
}

const PICTURE = /\.(png|jpe?g|jfif|webp)$/i;
const METADATA = /(^|\/)metadata\.(jsonl|csv)$/i;
const CAPTION = /\.(txt|caption)$/i;
const LITTER = /(^|\/)(\.|__macosx|thumbs\.db$|desktop\.ini$)/i;
const FOLD_BYTES = 2 ** 25; // of a zip in the making, before the browser may move it out of memory

export const isZip = (file: File): boolean => /\.zip$/i.test(file.name);

export const picked = (files: readonly File[]): Picked[] =>
  files.map((file) => ({ path: file.webkitRelativePath || file.name, file }));

/** Two pictures of one name, of different folders, both stay. */
export function gather(found: readonly Picked[]): Gathered {
  const sound = found.filter(({ path }) => !LITTER.test(path));
  const pictures = sound.filter(({ path }) => PICTURE.test(path));
  const stems = new Set(pictures.map(({ path }) => path.replace(PICTURE, '')));
  const captions = sound.filter(
    ({ path }) => METADATA.test(path) || (CAPTION.test(path) && stems.has(path.replace(CAPTION, ''))),
  );
  return { pictures: apart(pictures), captions, leftOut: sound.length - pictures.length - captions.length };
}

function apart(files: readonly Picked[]): Picked[] {
  const taken = new Set<string>();
  return files.map(({ path, file }) => {
    let name = path;
    for (let n = 2; taken.has(name.toLowerCase()); n++) name = path.replace(/(\.\w+)$/, `-${n}$1`);
    taken.add(name.toLowerCase());
    return { path: name, file };
  });
}

/** Stored, not packed: pictures hardly shrink. `caption` is of each of them, where no file says any. */
export async function zipped(
  { pictures, captions }: Gathered,
  caption: string,
  name: string,
  told: (done: number) => void,
): Promise<File> {
  const { Zip, ZipPassThrough } = await import('fflate'); // only who needs it pays for it
  let parts: Blob[] = [];
  let fresh = 0;
  const zip = new Zip((error, chunk) => {
    if (error) throw error;
    parts.push(new Blob([chunk]));
    if ((fresh += chunk.length) > FOLD_BYTES) [parts, fresh] = [[new Blob(parts)], 0];
  });
  const put = (path: string, bytes: Uint8Array) => {
    const entry = new ZipPassThrough(path);
    zip.add(entry);
    entry.push(bytes, true);
  };
  for (const { path, file } of captions) put(path, new Uint8Array(await file.arrayBuffer()));
  for (const [done, { path, file }] of pictures.entries()) {
    told(done);
    put(path, new Uint8Array(await file.arrayBuffer()));
  }
  if (caption.trim() && captions.length === 0) {
    const lines = pictures.map(({ path }) => JSON.stringify({ file_name: path, text: caption.trim() }));
    put('metadata.jsonl', new TextEncoder().encode(`${lines.join('\n')}\n`));
  }
  zip.end();
  return new File(parts, `${name.trim() || 'pictures'}.zip`, { type: 'application/zip' });
}

/** What was dropped, folders with all that is in them. To be called while the event is being handled. */
export async function dropped(transfer: DataTransfer): Promise<Picked[]> {
  const entries = [...transfer.items].flatMap((item) => item.webkitGetAsEntry() ?? []);
  if (!entries.some((entry) => entry.isDirectory)) return picked([...transfer.files]);
  return (await Promise.all(entries.map(within))).flat();
}

async function within(entry: FileSystemEntry): Promise<Picked[]> {
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ''), file }];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const found: Picked[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return found; // it gives about a hundred at a time
    for (const each of some) found.push(...(await within(each)));
  }
}
