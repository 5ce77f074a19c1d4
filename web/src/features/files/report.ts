/** The relay's report on a refused file, taken apart: "2 of 9 lines can't be used: line 3: …; line 7: …; and 4 more". */

export interface Report {
  summary: string;
  lines: { line: number; message: string }[];
  more: string;
}

export function reportOf(message: string): Report {
  const first = /(^|: )line \d+: /.exec(message);
  if (!first) return { summary: message, lines: [], more: '' };
  const start = first.index + (first[1]?.length ?? 0);
  const pieces = message.slice(start).split(/; (?=line \d+: |and \d+ more$)/);
  const more = pieces.at(-1)?.startsWith('and ') ? (pieces.pop() ?? '') : '';
  const lines = pieces.flatMap((piece) => {
    const match = /^line (\d+): (.*)$/s.exec(piece);
    return match ? [{ line: Number(match[1]), message: match[2] ?? '' }] : [];
  });
  return { summary: message.slice(0, first.index), lines, more };
}

export interface Named {
  summary: string;
  files: { name: string; message: string }[];
  more: string;
}

/** That on a zip of pictures: "the zip has 2 errors (…) beside 9 sound pictures: 1.png: …; 2.png: …; and 4 more". */
export function namesOf(message: string): Named | null {
  const head = /^the zip has [\d,]+ errors? \(.*?\) beside [\d,]+ sound pictures: /s.exec(message)?.[0];
  if (head === undefined) return null;
  const pieces = message.slice(head.length).split('; ');
  const more = /^and [\d,]+ more$/.test(pieces.at(-1) ?? '') ? (pieces.pop() ?? '') : '';
  const files: Named['files'] = [];
  for (const piece of pieces) {
    const found = /^(.+?): (.*)$/s.exec(piece);
    const last = files.at(-1);
    if (found) files.push({ name: found[1] ?? '', message: found[2] ?? '' });
    else if (last) last.message += `; ${piece}`;
  }
  return { summary: head.replace(/: $/, ''), files, more };
}
