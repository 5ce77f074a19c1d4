/** Whether the browser tells when a job ends: the user's wish, which is kept, and the browser's leave. */
import { useSyncExternalStore } from 'react';

export type Setting = 'on' | 'off' | 'denied' | 'unsupported';

const STORED = 'fine-notify';
const listeners = new Set<() => void>();
let wanted = read();

export function useNotify(): Setting {
  return useSyncExternalStore(subscribe, setting);
}

export function setting(): Setting {
  // Outside https there is neither; in a page of some phones there is a constructor that always throws (see show).
  if (typeof Notification === 'undefined' || !window.isSecureContext) return 'unsupported';
  if (!wanted) return 'off';
  return Notification.permission === 'granted' ? 'on' : Notification.permission === 'denied' ? 'denied' : 'off';
}

/** Within a click of the user's, and never else: browsers punish pages that ask unasked. */
export async function turnOn(): Promise<void> {
  if (typeof Notification === 'undefined') return;
  wanted = true;
  if (Notification.permission === 'default') await Notification.requestPermission();
  keep();
}

export function turnOff(): void {
  wanted = false;
  keep();
}

function subscribe(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function read(): boolean {
  try {
    return localStorage.getItem(STORED) === '1';
  } catch {
    return false;
  }
}

function keep(): void {
  try {
    localStorage.setItem(STORED, wanted ? '1' : '0');
  } catch {
    // Storage may be forbidden: then it holds until the page is left.
  }
  for (const listener of listeners) listener();
}
