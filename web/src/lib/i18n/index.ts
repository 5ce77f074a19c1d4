/** The page's two languages. The choice is kept; until there is one, the browser's language decides. */
import i18next from 'i18next';
import { initReactI18next } from 'react-i18next';
import { en } from './en';
import { ko } from './ko';

export const LANGUAGES = { ko: '한국어', en: 'English' } as const;
export type Language = keyof typeof LANGUAGES;
const STORED = 'fine-language';

declare module 'i18next' {
  interface CustomTypeOptions {
    defaultNS: 'translation';
    resources: { translation: typeof en };
  }
}

export async function startLanguage(): Promise<void> {
  await i18next.use(initReactI18next).init({
    resources: { en: { translation: en }, ko: { translation: ko } },
    lng: document.documentElement.lang === 'ko' ? 'ko' : 'en', // public/first.js has chosen
    fallbackLng: 'en',
    interpolation: { escapeValue: false }, // React does
  });
}

export async function setLanguage(language: Language): Promise<void> {
  try {
    localStorage.setItem(STORED, language);
  } catch {
    // Storage may be forbidden: then it holds until the page is left.
  }
  document.documentElement.lang = language;
  await i18next.changeLanguage(language);
}
