/** Model output as Markdown. No picture is loaded, no HTML is let in: neither is the model's to decide. */
import { memo } from 'react';
import ReactMarkdown from 'react-markdown';
import remarkGfm from 'remark-gfm';
import css from './Markdown.module.css';

export const Markdown = memo(function Markdown({ text }: { text: string }) {
  return (
    <div className={css.markdown}>
      <ReactMarkdown
        remarkPlugins={[remarkGfm]}
        skipHtml={false}
        disallowedElements={['img']}
        unwrapDisallowed
        components={{
          a: ({ href, children }) => (
            <a href={href} target="_blank" rel="noreferrer noopener nofollow">
              {children}
            </a>
          ),
          // Headings of an answer are not headings of the page.
          h1: ({ children }) => <p className={css.heading}>{children}</p>,
          h2: ({ children }) => <p className={css.heading}>{children}</p>,
          h3: ({ children }) => <p className={css.heading}>{children}</p>,
          h4: ({ children }) => <p className={css.heading}>{children}</p>,
          h5: ({ children }) => <p className={css.heading}>{children}</p>,
          h6: ({ children }) => <p className={css.heading}>{children}</p>,
          pre: ({ children }) => (
            <pre tabIndex={0} className={css.pre}>
              {children}
            </pre>
          ),
          input: ({ checked }) => <span>{checked ? '☑' : '☐'}</span>,
        }}
      >
        {text}
      </ReactMarkdown>
    </div>
  );
});
