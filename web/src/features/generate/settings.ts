/** What the generate screen is set to: model, dials, sampling, system prompt. Kept for this tab. */
import { useSyncExternalStore } from 'react';
import { NEUTRAL, type Band, type DialValues } from './dials';
import { DEFAULT_PICTURE, type PictureSettings } from './pictures';
import { DEFAULT_SAMPLING, type Sampling } from './sampling';

export interface Settings {
  model: string | null;
  dials: DialValues;
  bands: readonly Band[];
  sampling: Sampling;
  system: string;
  picture: PictureSettings;
}

const STORED = 'fine-generate';
const DEFAULTS: Settings = {
  model: null,
  dials: NEUTRAL,
  bands: [],
  sampling: DEFAULT_SAMPLING,
  system: '',
  picture: DEFAULT_PICTURE,
};

let settings: Settings = load();
const listeners = new Set<() => void>();

export function useSettings(): Settings {
  return useSyncExternalStore(
    (listener) => {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    () => settings,
  );
}

export function setSettings(fields: Partial<Settings>): void {
  settings = { ...settings, ...fields };
  try {
    sessionStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // Then they hold until the page is left.
  }
  for (const listener of listeners) listener();
}

/** The system prompt and the model's name are their user's, as the conversation is. */
export const forgetSettings = (): void => setSettings(DEFAULTS);

function load(): Settings {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED) ?? '{}') as Partial<Settings>;
    const sampling = { ...DEFAULT_SAMPLING, ...found.sampling }; // an older page knew fewer
    return { ...DEFAULTS, ...found, sampling, picture: { ...DEFAULT_PICTURE, ...found.picture } };
  } catch {
    return DEFAULTS;
  }
}
