/** Answers that are pictures, as a model that draws tells them. */
import type { Sampled } from './progress';

const PICTURE = /^data:image\/(webp|png|jpeg);base64,[A-Za-z0-9+/]+={0,2}$/;
export const MOST_SHOWN = 8;

/** What can be shown as a picture; it loads nothing from anywhere. */
export const asPicture = (answer: string | undefined): string | null =>
  answer !== undefined && PICTURE.test(answer) ? answer : null;

export const arePictures = (samples: readonly Sampled[]): boolean =>
  samples.some(({ answers }) => answers.some(({ answer }) => asPicture(answer) !== null));

/** The first, the last, and some between them, evenly. */
export function some<T>(all: readonly T[], most = MOST_SHOWN): readonly T[] {
  if (all.length <= most) return all;
  const places = Array.from({ length: most }, (_, i) => Math.round((i * (all.length - 1)) / (most - 1)));
  return all.filter((_, at) => places.includes(at));
}
